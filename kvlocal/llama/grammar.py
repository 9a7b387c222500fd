"""Grammar: keeps what is drawn to a grammar, by llama.cpp's own sampler for that."""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KvlocalError
from kvlocal.llama.library import load
from kvlocal.llama.model import Model


class GrammarError(KvlocalError, ValueError):
    """A text is no grammar, or none that can be followed."""


@dataclass(frozen=True)
class GrammarRules:
    """What an answer has to follow.

    text: the grammar in GBNF, llama.cpp's notation; its start is the rule "root"
    begun: what stands before the answer already and belongs to what the grammar describes
    triggers: regular expressions; it is followed from where one of them is found in the answer on, its first group that is not empty or all of it;
        () for from the beginning
    thought: the texts around a thought, in which triggers are not looked for; "" and "" if there is none
    """

    text: str
    begun: str = ""
    triggers: Sequence[str] = ()
    thought: tuple[str, str] = ("", "")


class Grammar:
    """Follows one answer. A grammar that waits for a trigger allows everything until then.

    Args:
        model: whose tokens are drawn.
        rules: what they have to follow.

    Raises:
        GrammarError: they are wrong.
    """

    def __init__(self, model: Model, rules: GrammarRules) -> None:
        library = load()
        self._lib, self._model = library.llama_cpp, model
        data = rules.text.encode("utf-8", "replace")
        vocab = library.ffi.cast("struct llama_vocab *", model.vocab)
        if library.lib.kvl_grammar_check(vocab, data, len(data)) < 0:
            reason = library.ffi.string(library.lib.kvl_last_error()).decode("utf-8", "replace")
            raise GrammarError(f"the grammar cannot be followed ({reason}): correct it")
        pointer = self._lib.llama_sampler_init_grammar(model.vocab, data, b"root")
        if not pointer:
            raise GrammarError("the grammar cannot be followed: correct it")
        self._pointer = pointer
        self._free = weakref.finalize(self, self._lib.llama_sampler_free, pointer)
        self._one = np.zeros(1, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._triggers = [re.compile(pattern.encode()) for pattern in rules.triggers]
        self._thought = [text.encode() for text in rules.thought]
        self._begun = rules.begun.encode()
        # while it waits: the tokens, where each one begins, and their bytes
        self._tokens: list[int] = []
        self._starts: list[int] = []
        self._said = bytearray()
        self.follows = not rules.triggers
        if self.follows and rules.begun and not self._accept_all(model.tokenize(rules.begun, parse_special=True).tolist()):
            raise GrammarError("the grammar does not go together with the model's chat template: leave out one of them")

    def allows(self, token: int) -> bool:
        """Whether this token may come next."""
        if not self.follows:
            return True
        self._one["id"], self._one["logit"] = token, 0
        self.restrict(self._one)
        return bool(np.isfinite(self._one["logit"][0]))

    def restrict(self, candidates: npt.NDArray[Any]) -> None:
        """Makes the tokens impossible that may not come next.

        candidates: [n] llama_token_data (id, logit, p); the logits of these tokens become -inf
        """
        if self.follows:
            array = token_data_array(self._lib, candidates)
            self._lib.llama_sampler_apply(self._pointer, ctypes.byref(array))

    def accept(self, token: int) -> None:
        """Goes on behind a token, which must be allowed."""
        if self.follows:
            # llama.cpp ends the process for a token that is not allowed
            if not self.allows(token):
                raise GrammarError(f"the token {token} does not follow the grammar: draw another one")
            self._lib.llama_sampler_accept(self._pointer, token)
        elif self._triggers:
            self._tokens.append(token)
            self._starts.append(len(self._said))
            self._said += self._model.token_bytes(token, special=True)
            self._begin_if_triggered()

    def _begin_if_triggered(self) -> None:
        found = [at for trigger in self._triggers if (at := self._triggered_at(trigger)) >= 0]
        if not found:
            return
        at = min(found)
        n_before = sum(start < at for start in self._starts)
        tokens = self._tokens[n_before:]
        end = self._starts[n_before] if tokens else len(self._said)
        if at < end:
            # the end of a token that began before
            part = bytes(self._said[at:end]).decode("utf-8", "replace")
            tokens = [*self._model.tokenize(part, parse_special=True).tolist(), *tokens]
        self._triggers.clear()
        # an answer that left it before it began goes on without it
        self.follows = True
        self.follows = self._accept_all(tokens)

    def _triggered_at(self, trigger: re.Pattern[bytes]) -> int:
        """Where the grammar begins by a trigger, -1 if it does not."""
        before, after = self._thought
        start = 0
        if before and after and before in self._begun + self._said:
            closed = self._said.rfind(after)
            if closed < 0:
                return -1
            start = closed + len(after)
        match = trigger.search(self._said, start)
        if not match:
            return -1
        return next((match.start(i) for i in range(1, trigger.groups + 1) if match[i]), match.start())

    def _accept_all(self, tokens: Sequence[int]) -> bool:
        """Goes on behind tokens, as far as they are allowed; returns whether all were."""
        for token in tokens:
            if not self.allows(token):
                return False
            self._lib.llama_sampler_accept(self._pointer, token)
        return True

    def close(self) -> None:
        """Frees it. Closing twice is harmless."""
        self._free()


def token_data_array(lib: Any, candidates: npt.NDArray[Any]) -> Any:
    """llama.cpp's view of candidates, [n] llama_token_data, which must outlive it."""
    return lib.llama_token_data_array(ctypes.cast(candidates.ctypes.data, lib.llama_token_data_p), len(candidates), -1, False)
