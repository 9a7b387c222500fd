"""Products of Q4_1 weights with several tokens at once, against each other and against ggml's own for a single token."""

import platform

import numpy as np
import pytest

from kvlocal.llama.context import Context

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have ggml's products for several tokens too"),
]

N = 20


@pytest.fixture(scope="module")
def model(shallow_model):
    return shallow_model


def cells(model, first, last, n_threads=2):
    """Keys and values of the tokens first .. last - 1, each the only one of its sequence, as llama.cpp writes them: float16 [n, values]."""
    tokens = np.random.default_rng(7).integers(100, model.n_vocab, N).astype(np.int32)[first:last]
    sequences = np.arange(first, last)
    with Context(model, n_cells=256, n_seq_max=N, n_ubatch=32, n_threads=n_threads) as context:
        context.decode_sequences(tokens, np.zeros(len(tokens), np.int32), sequences)
        return np.stack([context.state_get(i) for i in sequences]).view(np.float16)


@pytest.fixture(scope="module")
def together(model):
    return cells(model, 0, N)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17])
def test_the_number_of_tokens_makes_no_difference(model, together, n, n_threads):
    assert cells(model, 0, n, n_threads).tobytes() == together[:n].tobytes()


def test_a_single_token_is_ggmls_own_work(model, together):
    alone = np.concatenate([cells(model, i, i + 1) for i in range(N)])
    assert len(np.unique(alone.view(np.uint16), axis=0)) == N
    # with ggml's products too, a graph of one token rounds 0.4 % of the values otherwise, by a step of float16
    assert (alone.view(np.uint16) != together.view(np.uint16)).mean() < 0.01
    np.testing.assert_allclose(together.astype(np.float64), alone, rtol=2e-3, atol=1e-3, equal_nan=True)
