"""Every policy against a slow reference written from its formula, one layer, head and cell at a time."""

import dataclasses

import numpy as np
import pytest

from kvlocal.policies import POLICIES, CacheState, PolicyError, make

L, H, C, W = 3, 2, 90, 8


def random_state(seed, n_pinned=5, with_history=True):
    rng = np.random.default_rng(seed)
    pinned = np.zeros((L, H, C), bool)
    pinned[..., :n_pinned] = True
    history = rng.random((L, H, C)).astype(np.float32)
    history[..., 60:] = np.nan  # younger than the last compression
    if not with_history:
        history[:] = np.nan
    scores = (rng.random((L, H, C)) ** 6).astype(np.float32)
    redundancy = (rng.random((L, H, C)) * 0.02).astype(np.float32)
    return CacheState(pinned, history, W, scores, redundancy)


def reference_gkv(state, budget, alpha, lam):
    """sel[j] = lambda F_t[j] - (1 - lambda) R[j] with F_t[j] = max(alpha F_{t-1}[j], local[j]), and the cells it keeps."""
    kept, carried = np.zeros((L, H, budget), int), np.zeros((L, H, C))
    for layer in range(L):
        for head in range(H):
            attention, redundancy = state.scores[layer, head], state.redundancy[layer, head]
            top_attention, top_redundancy = max(attention[: C - W]), max(redundancy[: C - W])
            select = []
            for j in range(C):
                local = attention[j] / top_attention
                before = state.history[layer, head, j]
                f = local if np.isnan(before) else max(alpha * before, local)
                carried[layer, head, j] = f
                select.append(lam * f - (1 - lam) * redundancy[j] / top_redundancy)
            must = [j for j in range(C) if state.pinned[layer, head, j] or j >= C - W]
            others = sorted((j for j in range(C) if j not in must), key=lambda j: -select[j])
            kept[layer, head] = sorted(must + others[: budget - len(must)])
    return kept, carried


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("alpha", "lam"), [(0.8, 0.5), (0.3, 0.9), (1.0, 0.0)])
@pytest.mark.parametrize("with_history", [True, False])
def test_gkv_equals_its_formula(seed, alpha, lam, with_history):
    state = random_state(seed, with_history=with_history)
    plan = make("gkv", {"alpha": alpha, "lam": lam}).plan(state, 40)
    kept, carried = reference_gkv(state, 40, alpha, lam)
    np.testing.assert_array_equal(plan.keep, kept)
    np.testing.assert_allclose(plan.history, carried, rtol=1e-6)


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


def test_heads_without_any_attention_do_not_divide_by_zero():
    state = random_state(2)
    state.scores[0] = 0
    state.redundancy[1] = 0
    plan = make("gkv").plan(state, 40)
    assert np.isfinite(plan.history).all() and plan.keep.shape == (L, H, 40)


def test_names_and_hyper_parameters_are_checked():
    assert make("gkv", {"alpha": "0.25"}).alpha == 0.25
    for name, args, message in (
        ("gvk", {}, "gkv"),
        ("gkv", {"alfa": 1}, "alpha"),
        ("gkv", {"alpha": "much"}, "must be a float"),
        ("gkv", {"lam": 2}, "between 0 and 1"),
        ("streaming", {"alpha": 1}, "takes none"),
    ):
        with pytest.raises(PolicyError, match=message):
            make(name, args)
