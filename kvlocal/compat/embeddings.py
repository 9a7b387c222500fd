"""Embeddings as llama-cpp-python's Llama gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.compat.errors import NotSupported
from kvlocal.llama.embedding import Embedder, EmbeddingError
from kvlocal.llama.model import Model

# llama.cpp's numbers of pooling types
UNSPECIFIED, NONE, MEAN = -1, 0, 1


class Vectors:
    """Embeds texts with a model: one vector for each, or, where the model was trained for no pooling and none is asked for, one for each token.

    max_tokens: of a text
    pooling_type: by llama.cpp's numbers

    pooling_type: the one that is in use

    Raises:
        NotSupported: the model has another one.
        EmbeddingError: it has no embeddings.
    """

    def __init__(self, model: Model, *, max_tokens: int, n_threads: int | None, pooling_type: int) -> None:
        self._embedder = Embedder(model, max_tokens=max_tokens, n_threads=n_threads)
        own = self._embedder.pooling
        possible = (own,) if own != NONE else (NONE, MEAN)
        if pooling_type not in (UNSPECIFIED, *possible):
            known = " or ".join(map(str, possible))
            raise NotSupported(f"the model has no embeddings of the pooling_type {pooling_type}: leave it out, or use {known}")
        self.pooling_type = own if pooling_type == UNSPECIFIED else pooling_type

    def of(self, texts: Sequence[Sequence[int]], *, normalize: bool) -> list[list[Any]]:
        """The embeddings of texts, which are given as tokens: lists of numbers, or lists of such lists where there is one for each token.

        Args:
            normalize: of length 1.

        Raises:
            EmbeddingError: a text is empty, or too long.
        """
        embed: Callable[[Sequence[int]], npt.NDArray[np.float32]]
        embed = self._embedder.rows if self.pooling_type == NONE else self._embedder.raw
        found = []
        for tokens in texts:
            vectors = embed(tokens)
            if normalize:
                lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
                vectors = np.divide(vectors, lengths, out=vectors, where=lengths > 0)
            found.append(vectors.tolist())
        return found

    def close(self) -> None:
        """Frees the memory."""
        self._embedder.close()


def texts_of(given: Any) -> list[str]:
    """The texts of an argument that is one, or a list of them.

    Raises:
        EmbeddingError: it is something else.
    """
    texts: list[Any] = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else [None]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise EmbeddingError("input has to be a text or a list of texts")
    return texts


def reply(vectors: Sequence[list[Any]], n_tokens: int, model: str) -> dict[str, Any]:
    """Embeddings in OpenAI's form."""
    return {
        "object": "list",
        "data": [{"object": "embedding", "embedding": vector, "index": i} for i, vector in enumerate(vectors)],
        "model": model,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
