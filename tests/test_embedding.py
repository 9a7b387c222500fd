"""Embeddings of texts are the means of the vectors of their tokens, or what the model's own pooling makes of them."""

import threading

import numpy as np
import pytest
from gguf_copy import Source, copy

from kvlocal.llama.context import Context
from kvlocal.llama.embedding import Embedder, EmbeddingError
from kvlocal.llama.library import load
from kvlocal.llama.model import Model

LONG = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. " * 28
POOLING = {"mean": 1, "cls": 2, "last": 3}


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as loaded:
        yield loaded


@pytest.fixture
def embedder(model):
    with Embedder(model, n_threads=1) as embedder:
        yield embedder


def rows_of(model, tokens):
    """The vector behind each token, float64 [n, n_embd], the slow way: llama.cpp is asked for one after another."""
    lib = load().llama_cpp
    with Context(model, n_cells=1024, n_ubatch=1024, n_threads=1) as context:
        lib.llama_set_embeddings(context.pointer, True)
        context.decode(tokens, 0, logits="all")
        pointers = [lib.llama_get_embeddings_ith(context.pointer, i) for i in range(len(tokens))]
        return np.array([np.ctypeslib.as_array(pointer, (model.n_embd,)).copy() for pointer in pointers], np.float64)


def test_a_long_text_is_the_mean_of_its_tokens(model, embedder):
    """It is evaluated in several micro-batches."""
    tokens = embedder.tokenize(LONG)
    expected = rows_of(model, tokens).mean(axis=0)
    found = embedder.raw(LONG)
    assert found.shape == (model.n_embd,) and found.dtype == np.float32 and len(tokens) > 512
    # batches of other sizes are rounded otherwise
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert embedder.embed(LONG) @ expected / np.linalg.norm(expected) > 0.9999


def test_vectors_have_length_1_and_equal_texts_equal_vectors(embedder):
    first, second = embedder.embed("A cat sat on the mat."), embedder.embed("Something else.")
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)
    assert np.array_equal(embedder.embed("A cat sat on the mat."), first) and first @ second < 0.999
    embedder.embed(LONG)
    assert np.array_equal(embedder.embed("A cat sat on the mat."), first)


def test_tokens_are_taken_as_they_are(embedder):
    tokens = embedder.tokenize("A cat sat on the mat.")
    assert np.array_equal(embedder.embed(tokens.tolist()), embedder.embed("A cat sat on the mat."))


def test_what_is_alike_is_near(smollm2):
    with Model(smollm2) as model, Embedder(model, n_threads=1) as embedder:
        cat, kitten = embedder.embed("A cat sat on the mat."), embedder.embed("A kitten was sitting on the rug.")
        assert cat @ kitten > cat @ embedder.embed("The quarterly earnings of the company rose.")


@pytest.mark.parametrize("pooling", POOLING)
def test_a_model_that_says_how_texts_are_embedded(model, short_smollm2, tmp_path, pooling):
    copy(Source(short_smollm2), tmp_path / "embeds.gguf", added={"llama.pooling_type": POOLING[pooling]})
    with Model(tmp_path / "embeds.gguf") as embeds, Embedder(embeds, n_threads=1) as embedder:
        text = LONG[:1600]
        rows = rows_of(model, embedder.tokenize(text))
        expected = {"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}[pooling]
        assert np.abs(embedder.raw(text) - expected).max() < 0.02 * np.abs(expected).max()


def test_a_model_whose_tokens_see_what_follows(short_smollm2, tmp_path):
    """All of a text is evaluated at once, also in a context that was made larger for it."""
    copy(Source(short_smollm2), tmp_path / "both.gguf", added={"llama.attention.causal": False})
    with Model(tmp_path / "both.gguf") as both, Embedder(both, n_threads=1) as embedder:
        assert embedder.embed("A short one.") @ embedder.embed(LONG) < 1
        assert np.abs(embedder.raw(LONG) - rows_of(both, embedder.tokenize(LONG)).mean(axis=0)).max() < 0.1


def test_a_model_that_ranks_has_none(short_smollm2, tmp_path):
    copy(Source(short_smollm2), tmp_path / "ranks.gguf", added={"llama.pooling_type": 4})
    with Model(tmp_path / "ranks.gguf") as ranks, pytest.raises(EmbeddingError, match="ranks texts"):
        Embedder(ranks)


@pytest.mark.parametrize(
    "text, words", [([], "empty text"), ([10**9], "is no token"), ([-1], "is no token"), ("word " * 60, "50 are the most")]
)
def test_what_cannot_be_embedded(model, text, words):
    with Embedder(model, max_tokens=50, n_threads=1) as embedder:
        with pytest.raises(EmbeddingError, match=words):
            embedder.embed(text)
        assert embedder.embed([5]).shape == (model.n_embd,)


def test_several_threads_get_their_own(embedder):
    texts = [f"Text number {i} is about {i}." for i in range(8)]
    expected, found = [embedder.embed(text) for text in texts], {}
    threads = [threading.Thread(target=lambda text=text: found.update({text: embedder.embed(text)})) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[text], vector) for text, vector in zip(texts, expected, strict=True))
