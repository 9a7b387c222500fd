"""Attention of a few tokens on the CPU by our own operation, against what ggml's computes in float32: ggml does that for large batches only."""

import numpy as np
import pytest

from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.library import load
from kvlocal.llama.model import Model

pytestmark = pytest.mark.cpu_only

L = 4  # layers of the shallow model


@pytest.fixture(scope="module")
def model(shallow_model):
    return shallow_model


@pytest.fixture(scope="module")
def tokens(model):
    return np.random.default_rng(11).integers(100, model.n_vocab, 2048).astype(np.int32)


def make(model, tokens, n, *, n_cells=1024, n_threads=2, **options):
    """A context with n tokens in sequence 0."""
    context = Context(model, n_cells=n_cells, n_ubatch=128, n_threads=n_threads, **options)
    for start in range(0, n, 128):
        context.decode(tokens[start : min(start + 128, n)], start, logits="none")
    return context, NativeCache(context.pointer)


def probabilities(context):
    logits = context.logits_all().astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def decode(context, native, tokens, pos, ours=True, seq=0):
    """The probabilities after each of the tokens, which are removed again."""
    native.enable_attention(ours)
    context.decode(tokens, pos, seq=seq, logits="all")
    result = probabilities(context)
    context.remove(seq, pos, -1)
    return result


def exact(context, native, tokens, pos, seq=0):
    """The same, computed together with 64 later tokens, which the first ones do not see."""
    later = np.arange(500, 564, dtype=np.int32)
    return decode(context, native, np.r_[tokens, later], pos, False, seq)[: len(tokens)]


def assert_exact(context, native, tokens, pos):
    ours, reference = decode(context, native, tokens, pos), exact(context, native, tokens, pos)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4)
    ggml = decode(context, native, tokens, pos, False)
    assert (ours != ggml).any(), "our operation was not used"


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_is_exact(model, tokens, n_threads):
    context, native = make(model, tokens, 600, n_threads=n_threads)
    with context:
        assert_exact(context, native, tokens[600:601], 600)
        native.enable_ring(16)
        assert_exact(context, native, tokens[600:601], 600)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 255])
def test_few_cells(model, tokens, n):
    """With four threads some see no cell; the last block is not full."""
    context, native = make(model, tokens, n, n_threads=4)
    with context:
        assert_exact(context, native, tokens[n : n + 1], n)


@pytest.mark.parametrize("n", [2, 5, 16, 63])
def test_several_tokens_see_different_cells(model, tokens, n):
    context, native = make(model, tokens, 300)
    with context:
        assert_exact(context, native, tokens[300 : 300 + n], 300)


def test_larger_batches_are_left_to_ggml(model, tokens):
    context, native = make(model, tokens, 300)
    with context:
        ours, ggml = (decode(context, native, tokens[300:364], 300, ours) for ours in (True, False))
        np.testing.assert_array_equal(ours, ggml)


def test_quantised_caches_are_left_to_ggml(model, tokens):
    context, native = make(model, tokens, 300, type_k="q8_0", type_v="q8_0")
    with context:
        ours, ggml = (decode(context, native, tokens[300:301], 300, ours) for ours in (True, False))
        np.testing.assert_array_equal(ours, ggml)


def test_repeats_bit_by_bit(model, tokens):
    def run():
        context, native = make(model, tokens, 500)
        with context:
            results = []
            for i in range(500, 520):  # the graph is reused, and made again at 512 cells
                context.decode(tokens[i : i + 1], i)
                results.append(probabilities(context))
            native.enable_attention(False)
            native.enable_attention(True)
            context.decode(tokens[520:521], 520)
            return np.array([*results, probabilities(context)])

    np.testing.assert_array_equal(run(), run())


def test_stays_exact_while_graphs_are_reused(model, tokens):
    context, native = make(model, tokens, 400)
    with context:
        keep = np.r_[0:4, 101:424:2]
        results = []
        for pos in range(400, 460):
            if pos == 424:
                native.compact(np.broadcast_to(keep, (L, 3, len(keep))), keep)
            context.decode(tokens[pos : pos + 1], pos)
            results.append(probabilities(context))
        context.remove(0, 424, -1)
        reference = exact(context, native, tokens[424:460], 424)
    np.testing.assert_allclose(np.concatenate(results[24:]), reference, rtol=0, atol=1e-4)


def test_holes_and_compacted_heads(model, tokens):
    context, native = make(model, tokens, 700)
    with context:
        native.remove(np.r_[10:40, 64:300, 301:600:2])
        assert_exact(context, native, tokens[700:701], 700)
        used = np.flatnonzero(native.positions() >= 0)
        rng = np.random.default_rng(3)
        gather = np.sort([[rng.permutation(used)[:150] for _ in range(3)] for _ in range(L)], axis=-1)
        native.compact(gather, np.arange(150) + 550)
        assert_exact(context, native, tokens[700:703], 700)


def test_masked_cells_never_contribute(model, tokens):
    """Keys and values that are no numbers, in cells that were freed."""
    context, native = make(model, tokens, 200)
    with context:
        clean = decode(context, native, tokens[200:201], 200, True)
        context.decode_embeddings(np.full((100, model.n_embd), np.nan, np.float32), 200)
        assert np.isnan(native.read_values(0)[:, 200:]).all()
        context.remove(0, 200, -1)
        np.testing.assert_array_equal(decode(context, native, tokens[200:201], 200, True), clean)


def test_sequences_side_by_side(model, tokens):
    """One token for each of two sequences: two streams in one graph."""
    context, native = make(model, tokens, 300, n_seq_max=2)
    with context:
        context.decode(tokens[50:90], 0, seq=1)
        reference = [exact(context, native, tokens[:1], 300), exact(context, native, tokens[1:2], 40, seq=1)]
        native.enable_attention(True)
        context.decode_sequences(tokens[:2], [300, 40], [0, 1])
        np.testing.assert_allclose(probabilities(context), np.concatenate(reference), rtol=0, atol=1e-4)


def test_sliding_window_model(gemma3, tokens):
    with Model(gemma3) as model:
        n = 700  # past the window of 512
        context, native = make(model, tokens, n)
        with context:
            ours, ggml = (decode(context, native, tokens[n : n + 1], n, ours) for ours in (True, False))
            assert (ours != ggml).any()
            # quantised activations make ggml's rounding larger
            assert (ggml * np.log(ggml / ours)).sum() < 0.03 and ours.argmax() == ggml.argmax()


def test_refuses_no_context():
    library = load()
    assert library.lib.kvl_attention_enable(library.ffi.NULL, 1) == library.lib.KVL_ERR_ARGUMENT
