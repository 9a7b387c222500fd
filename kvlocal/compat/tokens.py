"""Tokens: what a vocabulary is asked for, in llama-cpp-python's forms."""

from __future__ import annotations

from collections.abc import Sequence

from kvlocal.llama.model import Model
from kvlocal.openai_forms.chat_fields import FieldError


class Tokens:
    """The vocabulary of a model. Who makes it sets `_model`."""

    _model: Model

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """The tokens of a text in UTF-8.

        Args:
            add_bos: put the tokens around it that the model wants around texts.
            special: turn the texts of control tokens into these tokens.

        Raises:
            FieldError: these are no bytes.
        """
        if not isinstance(text, bytes | bytearray):
            raise FieldError('text has to be bytes: give text.encode("utf-8")', "text")
        tokens: list[int] = self._model.tokenize(text.decode("utf-8", "replace"), add_special=add_bos, parse_special=special).tolist()
        return tokens

    def detokenize(self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False) -> bytes:
        """The bytes of tokens.

        Args:
            prev_tokens: of no effect.
            special: also spell out control tokens.
        """
        data = b"".join(self._model.token_bytes(int(token), special) for token in tokens)
        starts = len(tokens) > 0 and tokens[0] == self._model.bos
        return data.removeprefix(b" ") if starts else data

    def n_embd(self) -> int:
        """Numbers in an embedding."""
        return self._model.n_embd

    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self._model.n_vocab

    def token_bos(self) -> int:
        """The token that texts begin with, -1 if there is none."""
        return -1 if self._model.bos is None else self._model.bos

    def token_eos(self) -> int:
        """The token that texts end with, -1 if there is none."""
        return -1 if self._model.eos is None else self._model.eos

    def token_nl(self) -> int:
        """The token of a new line, -1 if there is none."""
        return -1 if self._model.newline is None else self._model.newline
