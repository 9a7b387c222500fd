"""Every policy against a slow reference written from its formula, one layer, head and cell at a time."""

import dataclasses

import numpy as np
import pytest

from kvlocal.policies import POLICIES, CacheState, PolicyError, make
from kvlocal.policies.base import keep_best
from kvlocal.policies.scoring import pooled

L, H, C, W = 3, 2, 90, 8
N_PINNED = 5


def random_state(seed, n_pinned=N_PINNED, with_history=True):
    """Arrays of every kind. Cells from 60 on are younger than the last compression; the last 20 and a few more were not read again yet."""
    rng = np.random.default_rng(seed)
    pinned = np.zeros((L, H, C), bool)
    pinned[..., :n_pinned] = True
    history = rng.random((L, H, C)).astype(np.float32)
    history[..., 60:] = np.nan
    if not with_history:
        history[:] = np.nan
    scores = (rng.random((L, H, C)) ** 6).astype(np.float32)
    redundancy = (rng.random((L, H, C)) * 0.02).astype(np.float32)
    sums = (rng.random((L, H, C)) ** 4 * 30).astype(np.float32)
    reread = (rng.random((L, H, C)) ** 3).astype(np.float32)
    reread[..., C - 20 :] = np.nan
    reread[rng.random((L, H, C)) < 0.05] = np.nan
    blocks = np.broadcast_to(np.arange(C, dtype=np.int32) // 6, (L, H, C)).copy()
    values = (0.2 + rng.random((L, H, C)) * 3).astype(np.float32)
    nexus = rng.random((L, H, C)) < 0.1
    return CacheState(pinned, history, W, scores, redundancy, sums, reread, blocks, values, nexus)


def reference_normalised(values, first=0):
    top = max(values[first : C - W])
    return [value / top for value in values]


def reference_pooled(values, pool):
    """Each cell before the window as the largest of the cells at most pool // 2 away that are before the window, too."""
    reach = pool // 2
    pooled = [max(values[i] for i in range(max(0, j - reach), min(C - W, j + reach + 1))) for j in range(C - W)]
    return [*pooled, *values[C - W :]]


def reference_local(attention, values=None, pool=1, first=0):
    if values is not None:
        attention = [a * v for a, v in zip(attention, values, strict=True)]
    return reference_normalised(reference_pooled(list(attention), pool), first)


def reference_global(history, local, alpha):
    return [now if np.isnan(before) else max(alpha * before, now) for before, now in zip(history, local, strict=True)]


def reference_select(score, redundancy, lam):
    return [lam * f - (1 - lam) * r for f, r in zip(score, reference_normalised(redundancy), strict=True)]


def assert_keeps_best(policy, state, importance):
    """The policy keeps what is pinned, the window and the most important others. importance(layer, head): a number for each cell."""
    keeps = {budget: policy.plan(state, budget).keep for budget in range(30, 70)}
    n_checked = 0
    for layer in range(L):
        for head in range(H):
            important = importance(layer, head)
            must = [j for j in range(C) if state.pinned[layer, head, j] or j >= C - W]
            others = sorted((j for j in range(C) if j not in must), key=lambda j: -important[j])
            for budget, keep in keeps.items():
                assert keep.shape == (L, H, budget)
                n = budget - len(must)
                # pooling makes neighbours equal: then either may go
                if important[others[n - 1]] != important[others[n]]:
                    assert keep[layer, head].tolist() == sorted(must + others[:n])
                    n_checked += 1
    assert n_checked > 20


def arrays_of(state, layer, head):
    """The arrays of one head, by name."""
    return {name: getattr(state, name)[layer, head] for name in ("history", "scores", "redundancy", "sums", "reread", "values")}


def reference_gkv(cells, alpha=0.8, lam=0.5, values=False, pool=1, free=False, reread=False, weight=1.0):
    """F_t[j] = max(alpha F_{t-1}[j], local[j]) and sel[j] = lambda F_t[j] - (1 - lambda) R[j] of one head."""
    norms, first = cells["values"] if values else None, N_PINNED if free else 0
    local = reference_local(cells["scores"], norms, pool, first)
    if reread:
        again = reference_local([0 if np.isnan(a) else a for a in cells["reread"]], norms, pool, first)
        local = [max(a, weight * b) for a, b in zip(local, again, strict=True)]
    score = reference_global(cells["history"], local, alpha)
    return score, reference_select(score, cells["redundancy"], lam)


GKV_ARGS = [
    {},
    {"alpha": 0.3, "lam": 0.9},
    {"alpha": 1.0, "lam": 0.0},
    {"values": True},
    {"pool": 5},
    {"values": True, "pool": 3, "lam": 0.7},
    {"free": True},
    {"free": True, "pool": 5, "lam": 1.0},
]


@pytest.mark.parametrize("name", ["gkv", "kvzip-gkv"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("args", GKV_ARGS, ids=str)
@pytest.mark.parametrize("with_history", [True, False])
def test_gkv_equals_its_formula(name, seed, args, with_history):
    state = random_state(seed, with_history=with_history)

    def reference(layer, head):
        return reference_gkv(arrays_of(state, layer, head), **args, reread=name == "kvzip-gkv")

    policy = make(name, args)
    assert_keeps_best(policy, state, lambda layer, head: reference(layer, head)[1])
    carried = [[reference(layer, head)[0] for head in range(H)] for layer in range(L)]
    np.testing.assert_allclose(policy.plan(state, 40).history, carried, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_h2o_equals_its_formula(seed):
    state = random_state(seed)
    assert_keeps_best(make("h2o"), state, lambda layer, head: state.sums[layer, head])
    assert make("h2o").plan(state, 40).history is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pool", [1, 5, 9])
def test_snapkv_equals_its_formula(seed, pool):
    state = random_state(seed)
    assert_keeps_best(make("snapkv", {"pool": pool}), state, lambda layer, head: reference_local(state.scores[layer, head], pool=pool))
    assert make("snapkv").plan(state, 40).history is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("args", [{}, {"lam": 0.7}, {"pool": 1}, {"lam": 0.4, "pool": 7}], ids=str)
def test_rkv_equals_its_formula(seed, args):
    state = random_state(seed)

    def select(layer, head):
        local = reference_local(state.scores[layer, head], pool=args.get("pool", 5))
        return reference_select(local, state.redundancy[layer, head], args.get("lam", 0.1))

    assert_keeps_best(make("rkv", args), state, select)
    assert make("rkv").plan(state, 40).history is None


@pytest.mark.parametrize("seed", range(3))
def test_kvzip_equals_its_formula(seed):
    """Cells not read again yet rank above all others, the newest first."""
    state = random_state(seed)

    def importance(layer, head):
        reread = state.reread[layer, head]
        order = sorted(range(C), key=lambda j: (1, j) if np.isnan(reread[j]) else (0, reread[j]))
        return {j: rank for rank, j in enumerate(order)}

    assert_keeps_best(make("kvzip"), state, importance)
    assert make("kvzip").plan(state, 40).history is None


@pytest.mark.parametrize("kernel", [1, 3, 5, 11])
@pytest.mark.parametrize(("n_cells", "window"), [(1, 0), (3, 1), (4, 4), (12, 3), (40, 0)])
def test_pooling_takes_the_largest_neighbour(kernel, n_cells, window):
    """Also with fewer cells than neighbours; the window neither gives nor takes, and the array is left as it was."""
    values = np.random.default_rng(n_cells).random((2, 3, n_cells)).astype(np.float32)
    values[..., n_cells - window :] += 5
    before = values.copy()
    result = pooled(values, window, kernel)
    for j in range(n_cells - window):
        around = before[..., max(0, j - kernel // 2) : min(n_cells - window, j + kernel // 2 + 1)]
        np.testing.assert_array_equal(result[..., j], around.max(axis=-1))
    np.testing.assert_array_equal(result[..., n_cells - window :], before[..., n_cells - window :])
    np.testing.assert_array_equal(values, before)


def test_snapkv_keeps_the_neighbours_of_a_peak():
    state = random_state(0)
    state.scores[..., 40] = 50
    keep = make("snapkv").plan(state, 5 + W + 5).keep
    for j in range(38, 43):
        assert (keep == j).any(axis=-1).all()


def test_kvzip_gkv_counts_the_second_read():
    """A cell that only the second read attends to stays; with gkv it goes."""
    state = random_state(1, with_history=False)
    state.scores[..., 20] = 0
    state.reread[..., 20] = 1
    state.redundancy[:] = 0
    assert (make("kvzip-gkv").plan(state, 30).keep == 20).any(axis=-1).all()
    assert not (make("gkv").plan(state, 30).keep == 20).any()


def test_kvzip_snapkv_is_snapkv_for_most_of_the_budget_and_kvzip_gkv_for_the_rest():
    state = random_state(1)
    for_now = make("kvzip-gkv", {"now": 0.5, "fresh": 0.5})
    np.testing.assert_array_equal(make("kvzip-snapkv").plan(state, 40).keep, for_now.plan(state, 40).keep)
    assert (make("kvzip-snapkv").plan(state, 40).keep != make("kvzip-gkv").plan(state, 40).keep).any()


def test_gkv_needs_only_what_it_weighs():
    for name, needs in (("gkv", {"scores", "redundancy"}), ("kvzip-gkv", {"scores", "redundancy", "reread"})):
        assert make(name).needs == needs
        assert make(name, {"values": True}).needs == needs | {"values"}
        assert make(name, {"lam": 1}).needs == needs - {"redundancy"}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_reads_only_what_it_needs(name):
    state, policy = random_state(3), make(name)
    optional = [field.name for field in dataclasses.fields(state) if field.default is None]
    bare = dataclasses.replace(state, **{field: None for field in optional if field not in policy.needs})
    np.testing.assert_array_equal(policy.plan(bare, 40).keep, policy.plan(state, 40).keep)


def test_gkv_remembers_what_mattered_once():
    """A cell with a high score before stays although nobody attends to it now; without memory it goes."""
    state = random_state(1)
    state.scores[..., 20] = 0
    state.history[..., 20] = 1
    state.redundancy[:] = 0
    assert (make("gkv", {"alpha": 0.9}).plan(state, 30).keep == 20).any(axis=-1).all()
    assert not (make("gkv", {"alpha": 0.0}).plan(state, 30).keep == 20).any()


def test_streaming_keeps_what_is_pinned_and_the_newest():
    plan = make("streaming").plan(random_state(0), 30)
    np.testing.assert_array_equal(plan.keep[1, 1], [*range(5), *range(C - 25, C)])


def test_full_keeps_everything():
    np.testing.assert_array_equal(make("full").plan(random_state(0), 30).keep[0, 0], np.arange(C))


@pytest.mark.parametrize("name", POLICIES)
def test_every_plan_is_a_valid_one(name):
    """Ascending cells of the budget's number, pinned cells and window among them; the arrays it was given are as before."""
    state = random_state(4, n_pinned=7)
    before = {field.name: np.copy(getattr(state, field.name)) for field in dataclasses.fields(state)}
    policy = make(name)
    keep = policy.plan(state, 33).keep
    assert keep.shape == (L, H, 33 if policy.evicts else C)
    assert (np.diff(keep, axis=-1) > 0).all() and keep.min() >= 0 and keep.max() < C
    for j in (*range(7), *range(C - W, C)):
        assert (keep == j).any(axis=-1).all()
    for name_, array in before.items():
        np.testing.assert_array_equal(getattr(state, name_), array)


@pytest.mark.parametrize("seed", range(3))
def test_of_equally_important_cells_the_newest_stay(seed):
    rng = np.random.default_rng(seed)
    importance = rng.integers(0, 3, (2, 3, 40)).astype(np.float32)
    pinned = np.broadcast_to(np.arange(40) < 2, importance.shape)
    state = CacheState(pinned, np.full(importance.shape, np.nan, np.float32), 4)
    for budget in (7, 20, 39):
        keep = keep_best(importance, state, budget)
        for place in np.ndindex(2, 3):
            forced = [*range(2), *range(36, 40)]
            others = sorted(range(2, 36), key=lambda cell: (-importance[place][cell], -cell))
            assert keep[place].tolist() == sorted([*forced, *others[: budget - len(forced)]])


@pytest.mark.parametrize("name", ["gkv", "kvzip-gkv"])
def test_heads_without_any_attention_do_not_divide_by_zero(name):
    state = random_state(2)
    state.scores[0] = 0
    state.redundancy[1] = 0
    state.reread[0] = np.nan
    plan = make(name).plan(state, 40)
    assert np.isfinite(plan.history).all() and plan.keep.shape == (L, H, 40)


def test_names_and_hyper_parameters_are_checked():
    assert make("gkv", {"alpha": "0.25"}).alpha == 0.25
    assert make("snapkv", {"pool": "7"}).pool == 7
    for text in ("true", "on", "1", "yes", "True", True, 1):
        assert make("gkv", {"values": text}).values is True
    for text in ("false", "off", "0", "no", "OFF", False, 0):
        assert make("gkv", {"values": text}).values is False
    for name, args, message in (
        ("gvk", {}, "gkv"),
        ("gkv", {"alfa": 1}, "alpha"),
        ("gkv", {"alpha": "much"}, "must be a float"),
        ("gkv", {"lam": 2}, "between 0 and 1"),
        ("gkv", {"alpha": "nan"}, "between 0 and 1"),
        ("gkv", {"values": "maybe"}, "must be true or false, not 'maybe'"),
        ("gkv", {"values": ""}, "must be true or false"),
        ("gkv", {"values": None}, "must be true or false"),
        ("gkv", {"values": 2}, "must be true or false"),
        ("gkv", {"pool": 2}, "odd"),
        ("kvzip-gkv", {"pool": -1}, "odd"),
        ("snapkv", {"pool": 0}, "odd"),
        ("snapkv", {"pool": "five"}, "must be a whole number"),
        ("rkv", {"lam": -0.1}, "between 0 and 1"),
        ("rkv", {"pool": 4}, "odd"),
        ("h2o", {"window": 3}, "takes none"),
        ("streaming", {"alpha": 1}, "takes none"),
    ):
        with pytest.raises(PolicyError, match=message):
            make(name, args)
    with pytest.raises(ValueError, match="True or False"):
        POLICIES["gkv"](values="false")


@pytest.mark.parametrize("seed", range(3))
def test_the_second_read_counts_by_its_weight(seed):
    state = random_state(seed)
    policy = make("kvzip-gkv", {"weight": 0.3, "free": True})

    def reference(layer, head):
        return reference_gkv(arrays_of(state, layer, head), weight=0.3, free=True, reread=True)

    assert_keeps_best(policy, state, lambda layer, head: reference(layer, head)[1])
    carried = [[reference(layer, head)[0] for head in range(H)] for layer in range(L)]
    np.testing.assert_allclose(policy.plan(state, 40).history, carried, rtol=1e-5)


@pytest.mark.parametrize("name", ["gkv", "kvzip-gkv"])
@pytest.mark.parametrize("now", [0.3, 1.0])
def test_a_share_of_the_budget_goes_to_what_counts_now(name, now):
    """That share of the free budget is the best by the last queries alone, and the rest the best by sel among what is left."""
    state, budget = random_state(4), 40
    kept = make(name, {"now": now}).plan(state, budget).keep
    n_now = round(now * (budget - N_PINNED - W))
    for layer in range(L):
        for head in range(H):
            cells = arrays_of(state, layer, head)
            free = range(N_PINNED, C - W)
            best = sorted(free, key=lambda j: -cells["scores"][j])[:n_now]
            select = reference_gkv(cells, reread=name == "kvzip-gkv")[1]
            others = sorted((j for j in free if j not in best), key=lambda j: -select[j])
            expected = [*range(N_PINNED), *best, *others[: budget - N_PINNED - W - n_now], *range(C - W, C)]
            assert kept[layer, head].tolist() == sorted(expected)


@pytest.mark.parametrize(("now", "fresh"), [(0.0, 0.2), (0.5, 0.5), (0.3, 1.0)])
@pytest.mark.parametrize("budget", [37, 40, 41])
def test_a_share_of_the_budget_goes_to_what_was_not_read_again_yet(now, fresh, budget):
    """The newest of these cells; what counts now comes before them, and the best by sel of the others after them."""
    state = random_state(5)
    kept = make("kvzip-gkv", {"now": now, "fresh": fresh}).plan(state, budget).keep
    room = budget - N_PINNED - W
    n_now = round(now * room)
    n_fresh = min(round(fresh * room), room - n_now)
    for layer in range(L):
        for head in range(H):
            cells = arrays_of(state, layer, head)
            free = range(N_PINNED, C - W)
            first = set(sorted(free, key=lambda j: -cells["scores"][j])[:n_now])
            unread = [j for j in free if np.isnan(cells["reread"][j])]
            first |= set(unread[len(unread) - min(n_fresh, len(unread)) :])
            select = reference_gkv(cells, reread=True)[1]
            others = sorted((j for j in free if j not in first), key=lambda j: -select[j])
            assert kept[layer, head].tolist() == sorted([*range(N_PINNED), *first, *others[: room - len(first)], *range(C - W, C)])
