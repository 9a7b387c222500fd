"""Blocks as rows of one array, and the policy that keeps them, against references written as loops over the blocks."""

import time

import numpy as np
import pytest

from kvlocal.policies import CacheState, PolicyError, make
from kvlocal.policies.blocks import UniformMap
from kvlocal.policies.gkv import GKV
from kvlocal.policies.scoring import against_redundancy
from kvlocal.policies.segmentation import Dynamic, FixedDelimiters, FixedInterval

L, H, C, W = 3, 2, 90, 8


def random_blocks(rng, shape=(L, H, C), longest=12, same=False):
    """Block numbers with gaps, as they are after some were dropped."""
    n_layer, n_head, n_cell = shape
    blocks = np.empty(shape, np.int32)
    for head in np.ndindex(n_layer, n_head):
        lengths = rng.integers(1, longest + 1, size=n_cell)
        numbers = np.cumsum(rng.integers(1, 4, size=n_cell))
        blocks[head] = np.repeat(numbers, lengths)[:n_cell]
    return np.broadcast_to(blocks[0, 0], shape) if same else blocks


def random_stays(rng, shape=(L, H, C), n_pinned=5, scattered=0):
    stays = np.zeros(shape, bool)
    stays[..., :n_pinned] = True
    stays[..., shape[-1] - W :] = True
    for head in np.ndindex(shape[:2]):
        stays[head][rng.choice(shape[-1], scattered, replace=False)] = True
    return stays


def reference_blocks(blocks, stays):
    """[(layer, head, cells, whether they stay)], head after head."""
    rows = []
    for layer, head in np.ndindex(blocks.shape[:2]):
        cells = [0]
        for j in range(1, blocks.shape[2]):
            here, before = (layer, head, j), (layer, head, j - 1)
            if blocks[here] != blocks[before] or stays[here] != stays[before]:
                rows.append((layer, head, cells, stays[before]))
                cells = []
            cells.append(j)
        rows.append((layer, head, cells, stays[layer, head, -1]))
    return rows


def reference_keep(blocks, stays, values, budget, fold):
    """What stays, then whole blocks by score, then the best cells of the first that does not fit; also its cells by head."""
    kept = np.zeros((*blocks.shape[:2], budget), int)
    parted = {}
    rows = reference_blocks(blocks, stays)
    for layer, head in np.ndindex(blocks.shape[:2]):
        cells_of = [(cells, must) for *at, cells, must in rows if at == [layer, head]]
        chosen = [j for cells, must in cells_of if must for j in cells]
        free = [cells for cells, must in cells_of if not must]
        score = {"mean": np.mean, "max": np.max}[fold]
        for cells in sorted(free, key=lambda cells: -score([values[layer, head, j] for j in cells])):
            if len(chosen) + len(cells) <= budget:
                chosen += cells
                continue
            best = sorted(cells, key=lambda j: -values[layer, head, j])
            chosen += best[: budget - len(chosen)]
            parted[layer, head] = cells
            break
        kept[layer, head] = sorted(chosen)
    return kept, parted


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("same", [True, False])
def test_every_block_is_a_row(seed, same):
    rng = np.random.default_rng(seed)
    blocks, stays = random_blocks(rng, same=same), random_stays(rng, scattered=0 if same else 6)
    uniform = UniformMap.from_blocks(blocks, stays)
    rows = reference_blocks(blocks, stays)
    assert uniform.index.dtype == np.int32 and uniform.index.shape == (len(rows), max(len(cells) for _, _, cells, _ in rows))
    assert uniform.lengths.tolist() == [len(cells) for _, _, cells, _ in rows]
    assert uniform.stays.tolist() == [must for _, _, _, must in rows]
    for row, (layer, head, cells, _) in zip(uniform.index, rows, strict=True):
        assert row[: len(cells)].tolist() == [(layer * H + head) * C + j for j in cells]
        assert (row[len(cells) :] == L * H * C).all()


def test_heads_with_the_same_blocks_need_not_be_a_view():
    rng = np.random.default_rng(0)
    blocks, stays = random_blocks(rng, same=True), random_stays(rng)
    view, copy = UniformMap.from_blocks(blocks, stays), UniformMap.from_blocks(blocks.copy(), stays)
    np.testing.assert_array_equal(view.index, copy.index)
    # the same blocks, but not the same pinned cells
    stays[1, 1, 40] = True
    assert len(UniformMap.from_blocks(blocks, stays).index) == len(reference_blocks(blocks, stays))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fold", ["mean", "max"])
@pytest.mark.parametrize("shape", [(L, H, C), (8, 8, 1000)], ids=["few", "more rows than are gathered at once"])
def test_scores_are_folded_over_the_cells(seed, fold, shape):
    rng = np.random.default_rng(seed)
    blocks, stays = random_blocks(rng, shape), random_stays(rng, shape)
    values = rng.normal(size=shape).astype(np.float32)
    scores = UniformMap.from_blocks(blocks, stays).scores(values, fold)
    score = {"mean": np.mean, "max": np.max}[fold]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(
        scores, [score(values[layer, head, cells]) for layer, head, cells, _ in reference_blocks(blocks, stays)], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fold", ["mean", "max"])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("budget", [25, 40, 77, 89])
def test_the_best_blocks_are_kept(seed, fold, same, budget):
    rng = np.random.default_rng(seed)
    blocks, stays = random_blocks(rng, same=same), random_stays(rng, scattered=0 if same else 4)
    values = rng.normal(size=(L, H, C)).astype(np.float32)
    uniform = UniformMap.from_blocks(blocks, stays)
    keep = uniform.keep(uniform.scores(values, fold), values, budget)
    expected, parted = reference_keep(blocks, stays, values, budget, fold)
    np.testing.assert_array_equal(keep, expected)
    # all but one block of a head are kept or dropped whole
    for layer, head, cells, _ in reference_blocks(blocks, stays):
        n_kept = np.isin(cells, keep[layer, head]).sum()
        assert n_kept in (0, len(cells)) or cells == parted[layer, head]


def test_a_budget_of_what_stays_and_of_everything():
    rng = np.random.default_rng(0)
    blocks, stays = random_blocks(rng), random_stays(rng)
    values = rng.normal(size=(L, H, C)).astype(np.float32)
    uniform = UniformMap.from_blocks(blocks, stays)
    scores = uniform.scores(values, "mean")
    np.testing.assert_array_equal(uniform.keep(scores, values, 5 + W)[1, 1], np.flatnonzero(stays[1, 1]))
    np.testing.assert_array_equal(uniform.keep(scores, values, C)[1, 1], np.arange(C))


def test_one_block_for_everything_and_one_for_each_cell():
    rng = np.random.default_rng(1)
    stays, values = random_stays(rng), rng.normal(size=(L, H, C)).astype(np.float32)
    best = np.sort(np.argsort(np.where(stays, np.inf, values), axis=-1)[..., C - 30 :], axis=-1)
    for blocks in (np.zeros((L, H, C), np.int32), np.broadcast_to(np.arange(C, dtype=np.int32), (L, H, C))):
        uniform = UniformMap.from_blocks(blocks, stays)
        np.testing.assert_array_equal(uniform.keep(uniform.scores(values, "mean"), values, 30), best)


def test_of_equal_blocks_the_newer_stays():
    blocks = np.broadcast_to(np.arange(C, dtype=np.int32) // 10, (L, H, C))
    values = np.zeros((L, H, C), np.float32)
    uniform = UniformMap.from_blocks(blocks, np.zeros((L, H, C), bool))
    np.testing.assert_array_equal(uniform.keep(uniform.scores(values, "max"), values, 30)[0, 1], np.arange(60, 90))


def random_state(seed, shape=(L, H, C), same=False, by_layer=False, longest=12):
    rng = np.random.default_rng(seed)
    pinned = np.zeros(shape, bool)
    pinned[..., :5] = True
    history = rng.random(shape, np.float32)
    history[..., shape[-1] * 2 // 3 :] = np.nan
    scores, redundancy = rng.random(shape, np.float32) ** 6, rng.random(shape, np.float32) * np.float32(0.02)
    blocks = random_blocks(rng, shape, longest, same)
    if by_layer:
        blocks = np.broadcast_to(blocks[:, :1], shape)
    return CacheState(pinned, history, W, scores, redundancy, blocks=blocks)


def select_of(state, plan, lam):
    return against_redundancy(plan.history, state.redundancy, W, lam)


def stays_of(state):
    stays = state.pinned.copy()
    stays[..., C - W :] = True
    return stays


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fold", ["mean", "max"])
def test_dynsplit_keeps_blocks_by_the_score_of_gkv(seed, fold):
    state = random_state(seed)
    plan = make("dynsplit", {"fold": fold, "alpha": "0.7", "lam": "0.4"}).plan(state, 40)
    np.testing.assert_array_equal(plan.history, GKV(alpha=0.7, lam=0.4).plan(state, 40).history)
    expected, _ = reference_keep(state.blocks, stays_of(state), select_of(state, plan, 0.4), 40, fold)
    np.testing.assert_array_equal(plan.keep, expected)


@pytest.mark.parametrize("seed", range(3))
def test_shared_heads_keep_the_same(seed):
    state = random_state(seed, by_layer=True)
    plan = make("dynsplit", {"shared": True}).plan(state, 40)
    select = select_of(state, plan, 0.5).mean(axis=1, keepdims=True)
    expected, _ = reference_keep(state.blocks[:, :1], stays_of(state)[:, :1], select, 40, "mean")
    np.testing.assert_array_equal(plan.keep, np.broadcast_to(expected, (L, H, 40)))
    assert (make("dynsplit").plan(state, 40).keep != plan.keep).any()


def test_dynsplit_divides_as_it_is_told():
    assert make("dynsplit", {"min_block": 3, "max_block": "24"}).splitter == Dynamic(3, 24)
    assert make("dynsplit", {"split": "delimiters", "max_block": 20}).splitter == FixedDelimiters(20)
    assert make("dynsplit", {"split": "interval", "length": 8}).splitter == FixedInterval(8)
    assert make("dynsplit").needs == {"scores", "redundancy", "blocks"}
    for name, value in (("fold", "sum"), ("split", "turns"), ("min_block", 0), ("min_block", 33), ("shared", "perhaps"), ("alpha", 2)):
        with pytest.raises(PolicyError, match=name):
            make("dynsplit", {name: value})


@pytest.mark.parametrize("same", [True, False])
def test_planning_takes_little_time(same):
    """4,096 cells, 32 layers, 8 KV heads, blocks of 16 cells in the mean; a little more than sorting the scores, in time of the processor."""
    state = random_state(0, (32, 8, 4096), same=same, longest=31)
    policy = make("dynsplit")
    planning, sorting = [], []
    for _ in range(5):
        started = time.thread_time()
        plan = policy.plan(state, 820)
        planned = time.thread_time()
        np.argsort(state.scores, axis=-1)
        planning.append(planned - started)
        sorting.append(time.thread_time() - planned)
    assert plan.keep.shape == (32, 8, 820) and (np.diff(plan.keep, axis=-1) > 0).all()
    assert min(planning) < 5 * min(sorting)
