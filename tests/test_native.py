"""The native layer against plain numpy computations of the same quantities from the keys and queries read back."""

import device
import numpy as np
import pytest
import tiny_model

from kvlocal.doctor.memory_estimate import available_memory
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.errors import NativeError
from kvlocal.llama.library import load
from kvlocal.llama.model import Model

pytestmark = pytest.mark.device

W = 16
N = 300  # tokens decoded by most tests
L = 4  # layers of the shallow model


@pytest.fixture(scope="module")
def full_model(smollm2):
    with Model(smollm2) as m:
        yield m


@pytest.fixture(scope="module")
def model(shallow_model):
    return shallow_model


class Chat:
    """A context with the ring on and some tokens in it."""

    def __init__(self, model, tokens, n=N, window=W, n_ubatch=128, n_cells=512, seq=0, **options):
        self.context = Context(model, n_cells=n_cells, n_ubatch=n_ubatch, **options)
        self.native = NativeCache(self.context.pointer, seq)
        if window:
            self.native.enable_ring(window)
        self.tokens, self.n_past, self.seq = tokens, 0, seq
        self.feed(n)

    def feed(self, n, batch=None):
        """Decodes the next n tokens and returns the logits of the last one."""
        end = self.n_past + n
        while self.n_past < end:
            step = min(batch or self.context.n_ubatch, end - self.n_past)
            self.context.decode(self.tokens[self.n_past : self.n_past + step], self.n_past, seq=self.seq)
            self.n_past += step
        return self.context.logits() if n else None

    def everywhere(self, cells):
        """The same cells for every layer and head, [L, H, n]."""
        layout = self.native.layout()
        return np.broadcast_to(cells, (layout.n_layer, layout.n_head_kv, len(cells)))

    def random_keep(self, n_keep, seed=0):
        """A random choice of n_keep cells per layer and head that holds the last W, ascending, [L, H, n_keep]."""
        layout, n = self.native.layout(), self.native.n_cells()
        keys = np.random.default_rng(seed).random((layout.n_layer, layout.n_head_kv, n))
        keys[..., n - W :] = 2
        return np.sort(np.argsort(-keys, axis=-1)[..., :n_keep], axis=-1)


def reference_weights(chat, layer, n_query, keys=None):
    """Softmax weights [n_query, query heads, C] in float64, from what is stored, or from keys [H, C, d] in the place of the cells'."""
    native = chat.native
    k = (native.read_keys(layer) if keys is None else keys).astype(np.float64)
    q = native.read_queries(layer).astype(np.float64)[-n_query:]
    pos, q_pos = native.positions(), native.query_positions()[-n_query:]
    k = np.repeat(k, q.shape[1] // k.shape[0], axis=0)
    logits = np.einsum("whd,hcd->whc", q, k) * native.kq_scale(layer)
    visible = (pos >= 0) & (pos[None] <= q_pos[:, None])
    logits = np.where(visible[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def reference_scores(chat, layer, n_query, largest=False, keys=None):
    weights = reference_weights(chat, layer, n_query, keys)
    n_head_kv = chat.native.layout().n_head_kv
    weights = weights.reshape(n_query, n_head_kv, -1, weights.shape[-1]).max(2)
    return weights.max(0) if largest else weights.mean(0)


def reference_redundancy(k, order):
    """R-KV's redundancy of one head, from keys [C, d] and the used cells by position, as the formula reads; and how close each choice was."""
    unit = k[order] / np.maximum(np.linalg.norm(k[order], axis=-1, keepdims=True), 1e-8)
    sim = unit @ unit.T
    np.fill_diagonal(sim, 0)
    margin = np.abs(sim - 0.5).min()
    for i in range(len(order)):
        similar = np.flatnonzero(sim[i] > 0.5)
        if len(similar):
            sim[i, similar[-1]] = 0
    e = np.exp(sim.mean(0) - sim.mean(0).max())
    out = np.zeros(len(k))
    out[order] = e / e.sum()
    return out, margin


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_scores_and_map_equal_numpy(full_model, tokens, cache, portable):
    chat = Chat(full_model, tokens, type_k=cache, type_v=cache, n_threads=2)
    chat.native.remove(np.array([3, 50, 51, 200]))
    for n_query in (W, 5):
        scores = chat.native.scores(n_query=n_query, portable=portable)
        largest = chat.native.scores(n_query=n_query, portable=portable, largest=True)
        weights = chat.native.attention_map([0, 29], n_query=n_query)
        assert scores.shape == (30, 3, N)
        for layer in (0, 11, 29):
            np.testing.assert_allclose(scores[layer], reference_scores(chat, layer, n_query), atol=1e-3)
            np.testing.assert_allclose(largest[layer], reference_scores(chat, layer, n_query, largest=True), atol=1e-3)
        for row, layer in zip(weights, (0, 29), strict=True):
            np.testing.assert_allclose(row, reference_weights(chat, layer, n_query).mean(1), atol=1e-3)
        assert not scores[..., [3, 50, 51, 200]].any() and scores.sum() > 0
    np.testing.assert_array_equal(chat.native.query_positions(), np.arange(N - W, N))


def test_scores_are_the_attention_the_model_paid(full_model, tokens):
    """The ring holds the queries attention used: without the cells that get no attention the output hardly moves, without the others it does."""
    logits = Chat(full_model, tokens).feed(1)
    chat = Chat(full_model, tokens)
    total = chat.native.scores().sum((0, 1))
    total[:4] = total[-W:] = np.inf
    least, most = np.argsort(total)[:60], np.argsort(np.where(np.isinf(total), 0, total))[-60:]
    moved = []
    for cells in (least, most):
        chat = Chat(full_model, tokens)
        chat.native.remove(cells)
        moved.append(np.abs(chat.feed(1) - logits).mean())
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_redundancy_equals_numpy(model, tokens, cache, portable):
    # repeated text, so that there are twins
    text = np.concatenate([tokens[:90], tokens[:90], tokens[200:280]])
    chat = Chat(model, text, n=260, type_k=cache, type_v=cache)
    chat.native.remove(np.array([7, 100]))
    redundancy = chat.native.redundancy(portable=portable)
    used = np.flatnonzero(chat.native.positions() >= 0)
    assert not redundancy[..., [7, 100]].any()
    for layer in (0, 2, 3):
        keys = chat.native.read_keys(layer).astype(np.float64)
        for head in range(3):
            expected, margin = reference_redundancy(keys[head], used)
            # a similarity within rounding of the threshold may fall on either side, and moves one entry of a mean
            np.testing.assert_allclose(redundancy[layer, head] / expected.max(), expected / expected.max(), atol=1e-3 if margin > 1e-6 else 5e-3)


def test_most_recent_goes_by_position_not_by_cell(model, tokens):
    """After removals new tokens sit in old holes: the twin that survives is the one with the highest position."""
    chat = Chat(model, tokens, n=N, n_cells=512)
    chat.native.remove(np.arange(20, 60))
    chat.context.remove(0, 280, -1)
    chat.n_past = 280
    chat.feed(10)
    pos = chat.native.positions()
    order = np.argsort(pos)[(pos < 0).sum() :]
    assert not np.array_equal(order, np.sort(order))
    redundancy = chat.native.redundancy()
    for head in range(3):
        expected, _ = reference_redundancy(chat.native.read_keys(3)[head].astype(np.float64), order)
        np.testing.assert_allclose(redundancy[3, head] / expected.max(), expected / expected.max(), atol=1e-3)


def test_ring_does_not_change_logits(full_model, tokens):
    on, off = Chat(full_model, tokens), Chat(full_model, tokens, window=0)
    for n, batch in ((1, 1), (40, 7), (3, 1)):
        np.testing.assert_array_equal(on.feed(n, batch), off.feed(n, batch))
    on.native.enable_ring(0)
    np.testing.assert_array_equal(on.feed(2, 1), off.feed(2, 1))


def test_ring_holds_the_last_queries_whatever_the_batches(model, tokens):
    whole, single = Chat(model, tokens, n=200, n_ubatch=256), Chat(model, tokens, n=150, n_ubatch=256)
    single.feed(43, 10)
    single.feed(7, 1)
    for layer in (0, L - 1):
        np.testing.assert_allclose(whole.native.read_queries(layer), single.native.read_queries(layer), atol=0.03)
    # going back: the queries that remain are the ones before, and no more than are whole
    single.context.remove(0, 195, -1)
    np.testing.assert_array_equal(single.native.query_positions(), np.arange(184, 195))
    short = Chat(model, tokens, n=5)
    np.testing.assert_array_equal(short.native.query_positions(), np.arange(5))


def test_scoring_between_single_tokens_leaves_the_decode_graph_alone(full_model, tokens):
    scored, plain = Chat(full_model, tokens), Chat(full_model, tokens)
    for _ in range(4):
        np.testing.assert_array_equal(scored.feed(1), plain.feed(1))
        scored.native.scores()
        scored.native.redundancy()


def test_identity_compaction_is_exact_for_f16(full_model, tokens):
    chat, plain = Chat(full_model, tokens, n_threads=2), Chat(full_model, tokens, n_threads=2)
    chat.feed(1), plain.feed(1)
    chat.native.compact(chat.everywhere(np.arange(N + 1)), np.arange(N + 1))
    for _ in range(3):
        np.testing.assert_array_equal(chat.feed(1), plain.feed(1))


@pytest.mark.parametrize("ascending", [True, False])
def test_compaction_moves_the_rows_it_names(model, tokens, ascending):
    for cache in ("f16", "q8_0"):
        chat = Chat(model, tokens, type_k=cache, type_v=cache)
        before = [(chat.native.read_keys(i), chat.native.read_values(i)) for i in (0, L - 1)]
        keep = chat.random_keep(120)
        if not ascending:
            keep = keep[..., ::-1]
        chat.native.compact(keep, np.r_[np.arange(104), np.arange(N - W, N)])
        assert chat.native.n_cells() == 120
        for (keys, values), layer in zip(before, (0, L - 1), strict=True):
            for read, old in ((chat.native.read_keys, keys), (chat.native.read_values, values)):
                expected = np.take_along_axis(old, keep[layer][..., None], axis=1)
                np.testing.assert_array_equal(read(layer), expected)


@pytest.mark.parametrize(("type_k", "type_v", "tolerance"), [("f16", "q8_0", 1e-3), ("q8_0", "q8_0", 1e-3), ("f16", "f16", 5e-3)])
def test_compaction_equals_masking_the_evicted_cells(model, tokens, type_k, type_v, tolerance):
    """The same cells for every head: compaction, upstream's removal and ours are three ways to the same attention.

    Probabilities agree within 1e-3, except where V is f16: there ggml's CPU flash attention sums in half precision, in the order of the cells,
    and a token that fills a hole changes that order.
    """
    evicted = np.sort(np.random.default_rng(3).choice(np.arange(4, N - W), 150, replace=False))
    keep = np.setdiff1d(np.arange(N), evicted)
    text = np.tile(tokens[:40], 20)
    compacted, removed, upstream = (Chat(model, text, type_k=type_k, type_v=type_v) for _ in range(3))
    compacted.native.compact(compacted.everywhere(keep), keep)
    removed.native.remove(evicted)
    for p in evicted:
        upstream.context.remove(0, int(p), int(p) + 1)
    np.testing.assert_array_equal(removed.native.positions(), upstream.native.positions())
    np.testing.assert_array_equal(compacted.native.positions(), keep)
    untouched = Chat(model, text, type_k=type_k, type_v=type_v)
    for n in (1, 1):
        a, b, c, d = (np.exp(log_softmax(chat.feed(n, n))) for chat in (compacted, removed, upstream, untouched))
        np.testing.assert_array_equal(b, c)
        np.testing.assert_allclose(a, c, atol=tolerance)
        assert np.abs(d - c).max() > 2 * tolerance  # the cells mattered


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def test_per_head_compaction_equals_per_head_attention(model, tokens):
    """After a compaction that differs by head, each head's scores are the softmax over the cells that head kept."""
    chat = Chat(model, tokens)
    keep = chat.random_keep(100)
    expected = np.stack([reference_weights(chat, layer, W) for layer in (0, 2)])
    chat.native.compact(keep, np.r_[np.arange(84), np.arange(N - W, N)])
    np.testing.assert_array_equal(chat.native.query_positions(), np.arange(N - W, N))
    after = chat.native.scores()
    for weights, layer in zip(expected, (0, 2), strict=True):
        for head in range(3):
            kept = weights[:, 3 * head : 3 * head + 3][..., keep[layer, head]]
            kept = kept / kept.sum(-1, keepdims=True)
            np.testing.assert_allclose(after[layer, head], kept.max(1).mean(0), atol=1e-3)


def rotate(k, delta, base, n_rot):
    """RoPE of keys [..., n, d] by delta [..., n] positions, adjacent pairs (llama's own order of dimensions)."""
    freq = base ** (-np.arange(0, n_rot, 2) / n_rot)
    angle = delta[..., None] * freq
    cos, sin = np.cos(angle), np.sin(angle)
    out = k.copy()
    a, b = k[..., 0:n_rot:2], k[..., 1:n_rot:2]
    out[..., 0:n_rot:2], out[..., 1:n_rot:2] = a * cos - b * sin, a * sin + b * cos
    return out


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_rerotation_equals_numpy(model, tokens, cache):
    chat = Chat(model, tokens, type_k=cache, type_v=cache)
    keep = chat.random_keep(100)
    stored = {layer: chat.native.read_keys(layer).astype(np.float64) for layer in (0, L - 1)}
    delta = np.arange(100) - keep
    chat.native.compact(keep, np.arange(100), delta)
    hadamard = hadamard_matrix(64) if cache == "q8_0" else np.eye(64)
    for layer, keys in stored.items():
        keys = np.take_along_axis(keys, keep[layer][..., None], axis=1) @ hadamard
        expected = rotate(keys, delta[layer].astype(np.float64), 100000.0, 64) @ hadamard
        got = chat.native.read_keys(layer)
        tolerance = 1e-3 if cache == "f16" else 1e-2  # half a step of q8_0
        np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())
    assert len(chat.native.query_positions()) == 0
    chat.n_past, chat.tokens = 100, np.roll(tokens, 100)
    assert np.isfinite(chat.feed(3, 1)).all()


def hadamard_matrix(n):
    m = np.ones((1, 1))
    while len(m) < n:
        m = np.block([[m, m], [m, -m]])
    return m / np.sqrt(n)


def test_rotating_everything_by_the_same_amount_changes_nothing(model, tokens):
    """Attention sees differences of positions only."""
    chat, plain = Chat(model, tokens), Chat(model, tokens)
    expected = plain.feed(1)
    every = chat.everywhere(np.arange(N))
    chat.native.compact(every, np.arange(N) + 1000, np.full(every.shape, 1000))
    chat.context.decode(tokens[N : N + 1], N + 1000)
    np.testing.assert_allclose(log_softmax(chat.context.logits()), log_softmax(expected), atol=2e-2)


def test_sequences_compact_independently(model, tokens):
    context = Context(model, n_cells=512, n_ubatch=128, n_seq_max=3)
    natives = [NativeCache(context.pointer, seq) for seq in range(3)]
    natives[0].enable_ring(W)
    for seq in range(3):
        for start in (0, 128):
            context.decode(tokens[seq * 10 + start :][:128], start, seq=seq)
    kept = natives[2].read_keys(3)
    queries = natives[2].read_queries(3)
    assert natives[1].layout().n_seq_max == 3
    gather = np.broadcast_to(np.r_[0:4, 200:256], (L, 3, 60))
    natives[1].compact(gather, np.r_[0:4, 200:256])
    assert [native.n_cells() for native in natives] == [256, 60, 256]
    np.testing.assert_array_equal(natives[2].read_keys(3), kept)
    np.testing.assert_array_equal(natives[2].read_queries(3), queries)
    context.decode(tokens[:1], 256, seq=2)
    three = context.logits()
    alone = Chat(model, tokens[20:], n=256)
    alone.context.decode(tokens[:1], 256)
    np.testing.assert_allclose(log_softmax(three), log_softmax(alone.context.logits()), atol=1e-3)


def test_the_rings_state_brings_overwritten_queries_back(model, tokens):
    chat = Chat(model, tokens, n=100)
    state, queries, scores = chat.native.ring_state(), chat.native.read_queries(2), chat.native.scores()
    chat.feed(40)
    chat.context.remove(0, 100, -1)
    assert len(chat.native.query_positions()) == 0
    chat.native.set_ring_state(state)
    np.testing.assert_array_equal(chat.native.query_positions(), np.arange(100 - W, 100))
    np.testing.assert_array_equal(chat.native.read_queries(2), queries)
    np.testing.assert_array_equal(chat.native.scores(), scores)


def test_state_restore_empties_the_ring(model, tokens):
    chat = Chat(model, tokens, n=100)
    state = chat.context.state_get(0)
    chat.context.clear()
    chat.context.state_set(0, state)
    assert len(chat.native.query_positions()) == 0
    with pytest.raises(NativeError, match="no query of this sequence is recorded"):
        chat.native.scores()
    chat.feed(4)
    np.testing.assert_array_equal(chat.native.query_positions(), np.arange(100, 104))


def test_wrong_calls_are_refused_and_change_nothing(model, tokens):
    chat = Chat(model, tokens, n=60, n_cells=256)
    native, lib, ffi = chat.native, load().lib, load().ffi
    ctx = native._context
    floats, ints = ffi.new("float[]", L * 3 * 60), ffi.new("int32_t[]", L * 3 * 60)
    good = np.broadcast_to(np.arange(60), (L, 3, 60))
    before = chat.native.read_keys(0)

    def code(call, *args):
        result = call(*args)
        assert result < 0 and ffi.string(lib.kvl_last_error())
        return result

    assert code(lib.kvl_ring_enable, ffi.NULL, 4) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_ring_enable, ctx, -1) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_ring_enable, ctx, 129) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_get_layout, ctx, ffi.NULL) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_get_layers, ctx, ints, L - 1) == lib.KVL_ERR_ARGUMENT
    for seq in (-1, 1, 10**6):
        assert code(lib.kvl_get_cells, ctx, seq, ffi.NULL, 0) == lib.KVL_ERR_ARGUMENT
        assert code(lib.kvl_get_scores, ctx, seq, 0, 0, floats, L, 3, 60) == lib.KVL_ERR_ARGUMENT
        assert code(lib.kvl_get_redundancy, ctx, seq, 0, floats, L, 3, 60) == lib.KVL_ERR_ARGUMENT
        assert code(lib.kvl_remove_cells, ctx, seq, ints, 1, 60) == lib.KVL_ERR_ARGUMENT
        assert code(lib.kvl_compact, ctx, seq, ints, ints, ffi.NULL, ffi.NULL, 0, L, 3, 1, 60) == lib.KVL_ERR_ARGUMENT
        assert code(lib.kvl_read_keys, ctx, seq, 0, floats, 60) == lib.KVL_ERR_ARGUMENT
        assert code(lib.kvl_read_queries, ctx, seq, 0, floats, 1) == lib.KVL_ERR_ARGUMENT
        assert code(lib.kvl_shift_beside, ctx, seq, 1) == lib.KVL_ERR_ARGUMENT
        assert code(lib.kvl_ring_get_state, ctx, seq, ffi.NULL, 0) == lib.KVL_ERR_ARGUMENT
        assert code(lib.kvl_ring_set_state, ctx, seq, ffi.new("uint8_t[]", 8), 8) == lib.KVL_ERR_ARGUMENT
    ring = native.ring_state()
    assert code(lib.kvl_ring_set_state, ctx, 0, ffi.NULL, len(ring)) == lib.KVL_ERR_ARGUMENT
    for wrong in (ring[:-1], np.full_like(ring, 7)):
        with pytest.raises(NativeError) as error:
            native.set_ring_state(wrong)
        assert error.value.code == lib.KVL_ERR_ARGUMENT
    np.testing.assert_array_equal(native.ring_state(), ring)
    assert code(lib.kvl_get_scores, ctx, 0, 0, 0, ffi.NULL, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_get_scores, ctx, 0, 0, 4, floats, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_get_scores, ctx, 0, -1, 0, floats, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_get_scores, ctx, 0, 0, 0, floats, L - 1, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_get_scores, ctx, 0, 0, 0, floats, L, 3, 59) == lib.KVL_ERR_STATE
    assert code(lib.kvl_get_scores, ctx, 0, 17, 0, floats, L, 3, 60) == lib.KVL_ERR_STATE
    assert code(lib.kvl_get_attention_map, ctx, 0, 4, ffi.new("int32_t[]", [L]), 1, floats, 60) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_get_attention_map, ctx, 0, 4, ints, L + 1, floats, 60) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_get_attention_map, ctx, 0, 0, ints, 1, floats, 60) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_get_redundancy, ctx, 0, lib.KVL_LARGEST, floats, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert code(lib.kvl_read_values, ctx, 0, L, floats, 60) == lib.KVL_ERR_ARGUMENT
    for cells in ([60], [-1], [5, 5]):
        with pytest.raises(NativeError) as error:
            native.remove(np.array(cells))
        assert error.value.code == lib.KVL_ERR_ARGUMENT
    for gather, pos in (
        (np.where(good == 59, 60, good), np.arange(60)),
        (np.where(good == 0, -5, good), np.arange(60)),
        (good, np.zeros(60)),
        (good, np.arange(60) - 1),
        (good[..., :0], np.arange(0)),
        (good[: L - 1], np.arange(60)),
    ):
        with pytest.raises(NativeError) as error:
            native.compact(gather, pos)
        assert error.value.code == lib.KVL_ERR_ARGUMENT
    native.remove(np.array([10]))
    with pytest.raises(NativeError, match="cell 10 is empty"):
        native.compact(good, np.arange(60))
    native.enable_ring(0)
    with pytest.raises(NativeError, match="ring is off"):
        native.scores()
    np.testing.assert_array_equal(chat.native.read_keys(0), before)
    chat.context.clear()
    with pytest.raises(NativeError, match="no cells"):
        native.redundancy()


def test_the_scale_of_a_layer_is_an_error_where_it_is_not_known(model, tokens):
    chat = Chat(model, tokens, n=4)
    assert chat.native.kq_scale(0) == pytest.approx(64**-0.5)
    empty, off = Chat(model, tokens, n=0), Chat(model, tokens, n=4, window=0)
    for other, layer, match in ((chat, L, "layer"), (chat, -1, "layer"), (empty, 0, "not known yet"), (off, 0, "off")):
        with pytest.raises(NativeError, match=match):
            other.native.kq_scale(layer)
    ffi, lib = load().ffi, load().lib
    assert lib.kvl_get_kq_scale(ffi.cast("struct llama_context *", chat.context.pointer), 0, ffi.NULL) == lib.KVL_ERR_ARGUMENT


@pytest.mark.skipif((available_memory() or 0) < 6 * 2**30, reason="takes 2.2 GB")
def test_a_ring_may_hold_more_than_two_gigabytes(tmp_path, monkeypatch):
    for name, value in {"N_EMBD": 8, "N_FF": 8, "N_HEAD": 256, "N_HEAD_KV": 1, "HEAD": 256}.items():
        monkeypatch.setattr(tiny_model, name, value)
    tiny_model.write_tiny_model(tmp_path / "wide.gguf", "llama", n_layer=32)
    n_window = 272
    with Model(tmp_path / "wide.gguf") as wide, Context(wide, n_cells=512, n_ubatch=n_window, n_outputs=1) as context:
        NativeCache(context.pointer).enable_ring(n_window)
        ffi, lib = load().ffi, load().lib
        size = lib.kvl_ring_get_state(ffi.cast("struct llama_context *", context.pointer), 0, ffi.NULL, 0)
        assert size == n_window * 4 + 32 * n_window * 256 * 256 * 4 > 2**31
        code = lib.kvl_ring_set_state(ffi.cast("struct llama_context *", context.pointer), 0, ffi.new("uint8_t[]", 8), 8)
        assert code == lib.KVL_ERR_ARGUMENT and str(size).encode() in ffi.string(lib.kvl_last_error())


def test_unsupported_caches_are_refused(model):
    lib = load().llama_cpp
    caches = [("transposed", {"flash_attn_type": 0}), ("share one stream", {"flash_attn_type": 1, "kv_unified": True})]
    if device.on_cpu():  # on CUDA llama.cpp itself aborts at this type
        caches.append(("type mxfp4", {"flash_attn_type": 1, "type_k": lib.GGML_TYPE_MXFP4}))
    for name, values in caches:
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = 512, 2
        params.kv_unified = False
        for key, value in values.items():
            setattr(params, key, value)
        pointer = lib.llama_init_from_model(model.pointer, params)
        with pytest.raises(NativeError, match=name) as error:
            NativeCache(pointer).enable_ring(W)
        assert error.value.code == load().lib.KVL_ERR_UNSUPPORTED
        lib.llama_free(pointer)


def test_sliding_window_model_compacts_its_global_layers(gemma3, tokens):
    with Model(gemma3) as model:
        n = 700  # past the window of 512
        chat = Chat(model, tokens, n=n, n_ubatch=128, n_cells=1024)
        layout = chat.native.layout()
        assert layout.is_swa and 0 < layout.n_layer < model.n_layer
        assert chat.native.n_cells() == n
        scores = chat.native.scores()
        for layer in range(layout.n_layer):
            np.testing.assert_allclose(scores[layer], reference_scores(chat, layer, W), atol=1e-3)
        plain = Chat(model, tokens, n=n, n_ubatch=128, n_cells=1024)
        every = chat.everywhere(np.arange(n))
        chat.native.compact(every, np.arange(n))
        np.testing.assert_array_equal(chat.feed(1), plain.feed(1))
        # moved back as a whole, with the sliding-window cache following: attention sees the same differences
        keep = chat.everywhere(np.arange(n + 1))
        chat.native.compact(keep, np.arange(n + 1) + 50, np.full(keep.shape, 50))
        chat.native.shift_beside(50)
        chat.context.decode(tokens[n + 1 : n + 2], n + 51)
        plain.feed(1)
        p, q = log_softmax(plain.context.logits()), log_softmax(chat.context.logits())
        assert (np.exp(p) * (p - q)).sum() < 0.02
        # the first two of these random tokens' successors are nearly equal, at 3 %
        np.testing.assert_allclose(np.exp(p), np.exp(q), rtol=0, atol=0.01)
        chat.native.compact(chat.everywhere(np.r_[0:4, 400 : n + 2]), np.r_[0:4, 400 : n + 2] + 50)
        assert chat.native.n_cells() == n + 2 - 396
        chat.context.decode(tokens[n + 2 : n + 3], n + 52)
        assert np.isfinite(chat.context.logits()).all()
