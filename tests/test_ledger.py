"""The ledger against a list of dictionaries that does the same one cell at a time."""

import time

import numpy as np

from kvlocal.cache.ledger import NEXUS, Ledger

L, H = 2, 3


def filled():
    ledger = Ledger(L, H, 64, ["history"])
    ledger.n_pinned = 3
    for role, n in (("system", 3), ("user", 7), ("assistant", 10)):
        ledger.begin_segment(role)
        ledger.append(np.full(n, 7, np.int32))
    return ledger


def test_compact_moves_each_head_by_itself():
    ledger, rng = filled(), np.random.default_rng(0)
    history = rng.random((L, H, 20)).astype(np.float32)
    keep = np.sort(rng.permuted(np.broadcast_to(np.arange(20), (L, H, 20)), axis=-1)[..., :8], axis=-1)
    ledger.scores("history")[:] = history
    ledger.compact(keep, None)
    assert (ledger.n_cells, ledger.n_tokens, ledger.next_position) == (8, 20, 20)
    for layer in range(L):
        for head in range(H):
            for j, cell in enumerate(keep[layer, head]):
                assert ledger.tokens[layer, head, j] == ledger.positions[layer, head, j] == cell
                assert ledger.carried["history"][layer, head, j] == history[layer, head, cell]
    ledger.append(np.zeros(2, np.int32))
    assert (ledger.tokens[..., 8:10] == [20, 21]).all() and np.isnan(ledger.carried["history"][..., 8:10]).all()


def test_rotation_sets_positions_and_leaves_tokens():
    ledger = filled()
    keep = np.broadcast_to(np.r_[0:4, 12:20], (L, H, 12))
    ledger.compact(keep, np.arange(5, 17))
    assert (ledger.positions[..., :12] == np.arange(5, 17)).all() and ledger.next_position == 17
    assert (ledger.tokens[..., :12] == np.r_[0:4, 12:20]).all()
    ledger.append(np.zeros(1, np.int32))
    assert (ledger.positions[..., 12] == 17).all() and (ledger.tokens[..., 12] == 20).all()


def test_pinned_cells_and_cells_per_segment():
    ledger = filled()
    keep = np.stack([np.stack([np.r_[0:3, 3 + h : 10, 18:20, 10 : 10 + h] for h in range(H)])] * L)
    keep.sort(axis=-1)
    ledger.compact(keep, None)
    assert ledger.pinned().sum(axis=-1).tolist() == [[3] * H] * L
    np.testing.assert_array_equal(ledger.cells_per_segment()[:, 0], [[3, 3, 3], [7, 6, 5], [2, 3, 4]])


def test_many_segments_are_counted_at_once():
    """Twenty thousand of them in some milliseconds, of which one counts none where it has lost all its cells."""
    n, kept = 20_000, 500
    ledger = Ledger(30, 3, n)
    for i in range(n):
        ledger.begin_segment("user" if i % 2 else "assistant")
        ledger.append(np.zeros(1, np.int32))
    rng = np.random.default_rng(0)
    keep = np.stack([np.sort(rng.choice(n, kept, replace=False)) for _ in range(90)]).reshape(30, 3, kept)
    ledger.compact(keep, None)
    started = time.thread_time()
    counts = ledger.cells_per_segment()
    assert time.thread_time() - started < 0.3
    assert counts.shape == (n, 30, 3) and (counts.sum(axis=0) == kept).all()
    np.testing.assert_array_equal(counts[:, 7, 1].nonzero()[0], keep[7, 1])


def test_nexus_tokens_are_counted_as_they_come_and_go():
    ledger = filled()
    for n in (3, 2):
        ledger.begin_segment("nexus")
        ledger.append(np.full(n, NEXUS, np.int32))
        ledger.begin_segment("user")
        ledger.append(np.zeros(4, np.int32))
    assert ledger.n_nexus == 5
    ledger.truncate(ledger.n_tokens - 5)
    assert ledger.n_nexus == 4 == (ledger.ids == NEXUS).sum()


def test_truncate_takes_the_tail_off():
    ledger = filled()
    ledger.compact(np.broadcast_to(np.r_[0:4, 8:20], (L, H, 16)), None)
    ledger.begin_segment("user")
    ledger.append(np.zeros(5, np.int32))
    assert ledger.truncate(18) == 7
    assert (ledger.n_cells, ledger.n_tokens, ledger.next_position) == (14, 18, 18)
    assert [(s.role, s.start, s.end) for s in ledger.segments] == [("system", 0, 3), ("user", 3, 10), ("assistant", 10, 18)]


def test_a_copy_is_independent():
    ledger = filled()
    other = ledger.copy()
    other.append(np.zeros(4, np.int32))
    other.compact(np.broadcast_to(np.arange(10), (L, H, 10)), np.arange(10))
    assert ledger.n_cells == ledger.n_tokens == 20 and ledger.segments[-1].end == 20
    assert (ledger.tokens[..., :20] == np.arange(20)).all()


def test_ids_grow_with_the_conversation_and_shrink_with_it():
    ledger = filled()
    keep = np.broadcast_to(np.arange(4), (L, H, 4))
    for i in range(10):
        ledger.compact(keep, None)
        ledger.append(np.full(12, 100 + i, np.int32))
    assert ledger.ids.tolist() == [7] * 20 + [100 + i for i in range(10) for _ in range(12)]
    ledger.truncate(130)
    assert len(ledger.ids) == 130


def test_blocks_follow_their_cells():
    ledger = filled()
    ledger.append_blocks(np.array([3, 10]))
    ledger.append_blocks(np.array([4]))
    assert ledger.blocks()[0, 0].tolist() == [0] * 3 + [1] * 7 + [2] * 4 + [3] * 6
    keep = np.stack([np.stack([np.r_[0:2, 2 + h, 12:20] for h in range(H)])] * L)
    ledger.compact(keep, None)
    assert ledger.blocks()[0].tolist() == [[0, 0, 0 if h == 0 else 1] + [2] * 2 + [3] * 6 for h in range(H)]
    ledger.truncate(13)
    assert len(ledger.block_of) == 13 and ledger.blocks()[0, 0].tolist() == [0, 0, 0, 2]


def test_a_copy_has_segments_of_its_own():
    ledger = filled()
    other, before = ledger.copy(), [vars(segment).copy() for segment in ledger.segments]
    ledger.append(np.zeros(5, np.int32))
    ledger.truncate(8)
    ledger.append(np.zeros(1, np.int32))
    ledger.segments[-1].text = "more"
    assert [vars(segment) for segment in other.segments] == before
    other.truncate(9)
    other.append(np.zeros(3, np.int32))
    assert [(segment.end, segment.text) for segment in ledger.segments] == [(3, ""), (9, "more")]
