"""PieceTokenizer: the tokens of pieces, as llama.cpp would tokenize their joined text, without letting contents yield markers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.template.pieces import Piece, Role

_C_WHITESPACE = " \t\n\v\f\r"


class PieceTokenizer:
    """Tokenizes pieces as llama.cpp would tokenize their joined text, but keeps contents from yielding markers.

    llama.cpp first cuts a text at its special tokens and then tokenizes each run of plain text between them. Here
    only markup is cut, and the runs, which may join markup and content, are read without special tokens.

    Args:
        model: the vocabulary.
        markup: all markup of the template. The special tokens in it are the template's markers.
    """

    def __init__(self, model: Model, markup: str) -> None:
        self._model = model
        lib = load().llama_cpp
        special = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        self._lstrip, self._rstrip = lib.LLAMA_TOKEN_ATTR_LSTRIP, lib.LLAMA_TOKEN_ATTR_RSTRIP
        self._markers: dict[str, int] = {}
        for token in map(int, np.unique(model.tokenize(markup, parse_special=True))):
            text = model.token_bytes(token, special=True).decode("utf-8", "replace")
            # runs of spaces and newlines can be tokens of this sort too; they are no markers
            if model.token_attributes(token) & special and text.strip() and text in markup:
                self._markers[text] = token
        # llama.cpp finds user-defined tokens even in text that is read without special tokens
        found_anyway = [
            text for text, token in self._markers.items() if token in model.tokenize(text, parse_special=False)
        ]
        self._marker = _any_of(self._markers)
        self._found_anyway = _any_of(found_anyway, overlapping=True)

    def run(self, pieces: Sequence[Piece]) -> list[tuple[Role, npt.NDArray[np.int32]]]:
        tokens: list[list[npt.NDArray[np.int32]]] = [[np.empty(0, dtype=np.int32)] for _ in pieces]
        fresh, strip_left = self._state_after(pieces[0].before if pieces else "")
        for parts, i, marker in self._cut(pieces):
            attributes = self._model.token_attributes(marker) if marker is not None else 0
            for owner, array in self._tokenize_run(parts, fresh, strip_left, bool(attributes & self._lstrip)):
                tokens[owner].append(array)
            if marker is not None:
                tokens[i].append(np.array([marker], dtype=np.int32))
            fresh, strip_left = True, bool(attributes & self._rstrip)
        return [(piece.role, np.concatenate(arrays)) for piece, arrays in zip(pieces, tokens, strict=True)]

    def _state_after(self, before: str) -> tuple[bool, bool]:
        """Whether the next run is at the start of a text or behind a special token, and whether that swallows space."""
        if not before:
            return True, False
        *_, last = [None, *self._marker.finditer(before)]
        if last is None:
            return False, False
        strips = bool(self._model.token_attributes(self._markers[last[0]]) & self._rstrip)
        rest = before[last.end() :]
        fresh = not (rest.lstrip(_C_WHITESPACE) if strips else rest)
        return fresh, fresh and strips

    def _cut(self, pieces: Sequence[Piece]) -> Iterator[tuple[list[tuple[int, str]], int, int | None]]:
        """Runs of plain text, as (piece, text) parts, each with the marker that ends it and that marker's piece."""
        parts: list[tuple[int, str]] = []
        for i, piece in enumerate(pieces):
            start = 0
            for match in self._marker.finditer(piece.text if piece.kind == "markup" else ""):
                yield [*parts, (i, piece.text[start : match.start()])], i, self._markers[match[0]]
                parts, start = [], match.end()
            parts.append((i, piece.text[start:]))
        yield parts, 0, None

    def _tokenize_run(
        self, parts: list[tuple[int, str]], fresh: bool, strip_left: bool, strip_right: bool
    ) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
        """The tokens of a run by the piece that holds their middle."""
        text = "".join(part for _, part in parts)
        owners = np.repeat([i for i, _ in parts], [len(_utf8(part)) for _, part in parts])
        # some special tokens swallow the whitespace beside them; it is ASCII, so characters are bytes
        if strip_right:
            text = text.rstrip(_C_WHITESPACE)
            owners = owners[: len(_utf8(text))]
        if strip_left:
            owners = owners[len(text) - len(text.lstrip(_C_WHITESPACE)) :]
            text = text.lstrip(_C_WHITESPACE)
        if not text:
            return
        tokens = self._read(text, fresh)
        if owners[0] == owners[-1]:
            yield int(owners[0]), tokens
            return
        lengths = np.array([len(self._model.token_bytes(token)) for token in tokens.tolist()])
        n_bytes = int(lengths.sum())
        middles = np.cumsum(lengths) - lengths + (lengths - 1) // 2
        if n_bytes == len(owners) + 1:
            # the space in front
            middles -= 1
        elif n_bytes != len(owners):
            # a vocabulary that rewrites the text; where a part ends can only be estimated
            middles = middles * len(owners) // max(n_bytes, 1)
        owner_of = owners[np.clip(middles, 0, len(owners) - 1)]
        for owner in np.unique(owner_of):
            yield int(owner), tokens[owner_of == owner]

    def _read(self, text: str, fresh: bool) -> npt.NDArray[np.int32]:
        """The tokens of plain text. A marker in it is read in two parts, which leaves nothing to be found."""
        starts = [match.start() + 1 for match in self._found_anyway.finditer(text)]
        chunks = [text[i:j] for i, j in itertools.pairwise([0, *starts, len(text)])]
        return np.concatenate([self._read_chunk(chunk, fresh and not i) for i, chunk in enumerate(chunks)])

    def _read_chunk(self, text: str, fresh: bool) -> npt.NDArray[np.int32]:
        tokens = self._model.tokenize(text, parse_special=False)
        if fresh or not self._model.adds_space:
            return tokens
        # behind other text there is no space in front; a byte that joins with nothing stands for that text
        text_before = self._model.tokenize("\x01", parse_special=False)
        behind = self._model.tokenize("\x01" + text, parse_special=False)
        n = len(text_before)
        return behind[n:] if np.array_equal(behind[:n], text_before) else tokens


def _any_of(texts: Iterable[str], *, overlapping: bool = False) -> re.Pattern[str]:
    """Finds these texts, the longest first; never matches if there are none."""
    either = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
    return re.compile(f"(?={either})" if overlapping else either)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")
