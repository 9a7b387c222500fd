"""Embedder: vectors that say what texts are about, by llama.cpp's embeddings of the tokens in them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KvlocalError
from kvlocal.llama.context import Context
from kvlocal.llama.errors import EngineError
from kvlocal.llama.free_cores import Threads
from kvlocal.llama.library import load
from kvlocal.llama.model import Model

DEFAULT_LENGTH = 8192  # tokens of an input, as OpenAI's models have it

_LEAST_CELLS = 512
_N_UBATCH = 256  # tokens that are evaluated at once; each costs memory for its logits, which nobody wants

Text = str | Sequence[int] | npt.NDArray[np.int32]
T = TypeVar("T")


class EmbeddingError(KvlocalError, ValueError):
    """A text has no embedding, or none by this model."""


class Embedder:
    """Embeds texts with a model, in a context of its own, which is made when the first text comes and again for a longer one.

    A model that was trained for it says how the vectors of a text's tokens become one (its pooling type), and llama.cpp computes that; of any other
    model it is the mean of the last layer's outputs behind its norm. A long text is evaluated micro-batch by micro-batch, unless its tokens see what
    follows them. May be used from several threads; one at a time computes.

    Args:
        model: the weights; must outlive it.
        max_tokens: the longest text; no more than the model was trained for.
        n_threads: as Context has it.
        compute: calls what computes, and returns what that returns: where a thread of another's has to do it.

    Attributes:
        n_embd: length of a vector.
        max_tokens: the longest text.
        pooling: the model's own pooling type, by llama.cpp's numbers; 0 if it was trained for none.

    Raises:
        EmbeddingError: the model ranks texts and embeds none.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_tokens: int = DEFAULT_LENGTH,
        n_threads: Threads = None,
        compute: Callable[[Callable[[], T]], T] = lambda function: function(),
    ) -> None:
        self._lib = lib = load().llama_cpp
        self._model, self._n_threads = model, n_threads
        self._compute: Callable[[Callable[[], Any]], Any] = compute
        architecture = model.metadata.get("general.architecture", "")
        self.pooling = int(model.metadata.get(f"{architecture}.pooling_type", lib.LLAMA_POOLING_TYPE_NONE))
        if self.pooling == lib.LLAMA_POOLING_TYPE_RANK:
            raise EmbeddingError(f"{model.path} ranks texts and has no embeddings of them: choose another model")
        # a token that sees what follows it wants all of a text at once
        self._whole = model.metadata.get(f"{architecture}.attention.causal") == "false"
        self.max_tokens = min(max_tokens, model.n_ctx_train)
        self.n_embd = model.n_embd_out
        self._context: Context | None = None
        self._lock = threading.Lock()

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """The tokens of a text, int32 [n], with what the model wants around it, and control tokens where their texts are.

        Raises:
            EmbeddingError: the model has no tokens for it.
        """
        try:
            return self._model.tokenize(text, parse_special=True, add_special=True)
        except EngineError as error:
            raise EmbeddingError(str(error)) from error

    def embed(self, text: Text) -> npt.NDArray[np.float32]:
        """The embedding of a text, or of its tokens, which are taken as they are: float32 [n_embd], of length 1.

        Raises:
            EmbeddingError: there is nothing in it, something that is no token, or more than max_tokens.
            EngineError: there is not enough memory, or llama.cpp failed.
        """
        vector = self.raw(text)
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if not np.isfinite(length):
            raise EngineError("the embedding is no numbers: the model's file is damaged or a device failed; fetch it again or use --gpu-layers 0")
        return vector / np.float32(length) if length else vector

    def raw(self, text: Text) -> npt.NDArray[np.float32]:
        """As `embed`, of the length that the model gives it."""
        parts = self._parts(text, self._vector)
        vectors, lengths = [vector for vector, _ in parts], [length for _, length in parts]
        if self.pooling == self._lib.LLAMA_POOLING_TYPE_CLS:
            return vectors[0]
        if self.pooling == self._lib.LLAMA_POOLING_TYPE_LAST:
            return vectors[-1]
        return np.average(np.array(vectors, np.float64), axis=0, weights=lengths).astype(np.float32)

    def rows(self, text: Text) -> npt.NDArray[np.float32]:
        """The vectors of the tokens of a text one by one, float32 [n, n_embd].

        Raises:
            EmbeddingError: as `embed` does, or the model has them only as one.
        """
        if self.pooling != self._lib.LLAMA_POOLING_TYPE_NONE:
            raise EmbeddingError(f"{self._model.path} has one embedding for a text and none for each token: ask for that")
        return np.concatenate([rows for rows, _ in self._parts(text, self._rows)])

    def _parts(
        self, text: Text, made: Callable[[Context, npt.NDArray[np.int32], int], npt.NDArray[np.float32]]
    ) -> list[tuple[npt.NDArray[np.float32], int]]:
        """What is made of each micro-batch of a text, and how many tokens it has."""
        tokens = self.checked(text)
        with self._lock:
            context = self._context_for(len(tokens))
            self._compute(context.clear)
            found = []
            for start in range(0, len(tokens), context.n_ubatch):
                part = tokens[start : start + context.n_ubatch]
                found.append((self._compute(lambda part=part, start=start: made(context, part, start)), len(part)))  # type: ignore[misc]
        return found

    def checked(self, text: Text) -> npt.NDArray[np.int32]:
        """The tokens that `embed` embeds, int32 [n].

        Raises:
            EmbeddingError: as `embed` does.
        """
        if isinstance(text, str):
            tokens = self.tokenize(text)
        else:
            if wrong := [token for token in (min(text, default=0), max(text, default=0)) if not 0 <= token < self._model.n_vocab]:
                raise EmbeddingError(f"{wrong[0]} is no token: the model's tokens go from 0 to {self._model.n_vocab - 1}")
            tokens = np.array(text, np.int32)
        if not len(tokens):
            raise EmbeddingError("an empty text has no embedding: leave it out")
        if len(tokens) > self.max_tokens:
            raise EmbeddingError(f"a text of {len(tokens)} tokens is too long to be embedded, {self.max_tokens} are the most: divide it")
        return tokens

    def _context_for(self, n_tokens: int) -> Context:
        """A context that has room for so many tokens."""
        if self._context is None or self._context.closed or self._context.n_cells < n_tokens:
            if self._context is not None:
                self._compute(self._context.close)
            n_cells = min(max(_LEAST_CELLS, 1 << (n_tokens - 1).bit_length()), max(self.max_tokens, n_tokens))
            n_ubatch = n_cells if self._whole else min(_N_UBATCH, n_cells)
            self._context = self._compute(lambda: Context(self._model, n_cells=n_cells, n_ubatch=n_ubatch, n_threads=self._n_threads))
            assert self._context is not None
            self._lib.llama_set_embeddings(self._context.pointer, True)
        return self._context

    def _vector(self, context: Context, tokens: npt.NDArray[np.int32], start: int) -> npt.NDArray[np.float32]:
        """The vector of the tokens of a micro-batch, which begins at a position: as the model pools them, else their mean; float32 [n_embd]."""
        if self.pooling == self._lib.LLAMA_POOLING_TYPE_NONE:
            return self._rows(context, tokens, start).mean(axis=0, dtype=np.float64).astype(np.float32)
        context.decode(tokens, start, logits="all")
        pointer = self._lib.llama_get_embeddings_seq(context.pointer, 0)
        if not pointer:
            raise EngineError("llama.cpp gave no embedding: try again, or use another model")
        return np.ctypeslib.as_array(pointer, (self.n_embd,)).copy()

    def _rows(self, context: Context, tokens: npt.NDArray[np.int32], start: int) -> npt.NDArray[np.float32]:
        """The vectors of the tokens of a micro-batch, float32 [n, n_embd], of a model that pools none."""
        context.decode(tokens, start, logits="all")
        return np.ctypeslib.as_array(self._lib.llama_get_embeddings(context.pointer), (len(tokens), self.n_embd)).copy()

    def close(self) -> None:
        """Frees the context. Closing twice is harmless."""
        with self._lock:
            if self._context is not None:
                self._context.close()
                self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
