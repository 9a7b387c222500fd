"""The record of kept tokens: what every token of a conversation saw while it was evaluated."""

import numpy as np
import pytest

from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.cache.config import CacheConfig
from kvlocal.cache.kept_tokens import Change, KeptTokens, seen


def test_without_a_change_everything_before_is_seen():
    visible = seen([], 2, 5, 1, 2)
    assert visible.shape == (1, 2, 3, 5)
    assert (visible == np.tri(5, dtype=bool)[2:]).all()


def test_a_change_holds_from_the_next_token_on_and_the_last_of_several():
    kept = [(3, [[[0, 2], [1, 2]]]), (5, [[[0], [0]]]), (5, [[[4], [2]]])]
    changes = [Change(n, np.array(tokens, np.int32)) for n, tokens in kept]
    visible = seen(changes, 0, 7, 1, 2)
    first, other = ([np.flatnonzero(row).tolist() for row in head] for head in visible[0])
    assert first == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 2, 3, 4], [4, 5], [4, 5, 6]]
    assert other == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [1, 2, 3, 4], [2, 5], [2, 5, 6]]
    assert (seen(changes, 4, 7, 1, 2) == visible[:, :, 4:]).all()


@pytest.mark.parametrize("policy", ["gkv", "snapkv", "h2o"])
def test_the_record_is_what_the_ledger_held(shallow_model, tokens, policy):
    config = CacheConfig(policy=policy, budget=64, stride=24, positions="original", archive="off", n_ubatch=64, n_threads=1)
    saw = []
    with BudgetedCache(shallow_model, config, undo=False) as cache:
        cache.begin(4)
        kept = cache.compressor.observe = KeptTokens()
        cache.ledger.begin_segment("user")
        for chunk in (60, 28, 10, 14, *([1] * 60)):
            ledger = cache.ledger
            n = ledger.n_tokens
            before = ledger.tokens[..., : ledger.n_cells].copy()
            cache.append(tokens[n : n + chunk])
            saw += [(n + i, before, n) for i in range(chunk)]
        n_tokens, (n_layer, n_head) = cache.ledger.n_tokens, before.shape[:2]
    assert len(kept.changes) > 3
    visible = seen(kept.changes, 0, n_tokens, n_layer, n_head)
    for token, before, start in saw:
        expected = np.zeros((n_layer, n_head, n_tokens), bool)
        np.put_along_axis(expected, before, True, axis=-1)
        expected[..., start : token + 1] = True
        assert (visible[:, :, token] == expected).all()


def test_a_record_that_is_copied_goes_on_alone():
    kept = KeptTokens([Change(3, np.zeros((1, 1, 1), np.int32))])
    other = kept.copy()
    other.changes.append(Change(4, np.zeros((1, 1, 1), np.int32)))
    assert len(kept.changes) == 1
