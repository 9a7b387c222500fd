"""Texts: texts that are gone on with in slots, and stay there, as long as nothing else needs them, for requests that begin alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.text_session import Prompt, TextSession
from kvlocal.llama.model import Model
from kvlocal.llama.slots import Slots
from kvlocal.serving.answering import Answering
from kvlocal.serving.live import Cancelled, weakly
from kvlocal.serving.request import TextRequest, Usage


class LiveText:
    """A text in a slot, and the request that it works on. It is used in turns of the slots' scheduler.

    owner: whose it is
    session: the text so far
    usage: what the request has taken
    last_used: when, in seconds of time.monotonic
    """

    def __init__(self, slots: Slots, model: Model, config: SessionConfig, owner: str) -> None:
        self.owner, self.usage, self.last_used = owner, Usage(), 0.0
        self._answering: Answering | None = None
        self.session = TextSession(model, config, progress=weakly(self._check), make_context=slots.open)

    def _check(self, *_: Any) -> None:
        if self._answering is not None and self._answering.cancelled:
            raise Cancelled

    def read(self, answering: Answering, request: TextRequest, tokens: npt.NDArray[np.int32]) -> None:
        """Makes the text these tokens, int32 [n], those of the request, and passes them on if they are to be told.

        Raises:
            Cancelled: nobody waits for it any more.
            KvlocalError: they cannot be read.
        """
        session, n_top = self.session, request.options.top_logprobs if request.echo else None
        wanted = request.sampling or session.config.sampling
        if session.sampling != wanted:
            session.set_sampling(wanted)
        self._answering = answering
        try:
            self._check()
            n_known = session.read(tokens, top_logprobs=n_top)
        finally:
            self._answering = None
        self.usage = Usage(prompt_tokens=len(tokens), cached_tokens=n_known)
        if request.echo:
            answering.emit(self._echo(request.prompt, tokens))

    def _echo(self, prompt: Prompt, tokens: npt.NDArray[np.int32]) -> AnswerPiece:
        """The text, and the log-probabilities of what it says: what was put in front of it is no part of it."""
        model, told = self.session.model, self.session.prompt_logprobs
        if not isinstance(prompt, str):
            return AnswerPiece(model.detokenize(tokens, special=True), logprobs=told)
        front = model.token_bytes(int(tokens[0]), special=True)
        was_put = int(tokens[0]) in (model.bos, model.eos) and not prompt.encode("utf-8", "replace").startswith(front)
        return AnswerPiece(prompt, logprobs=told[was_put:])

    def go_on(self, answering: Answering, request: TextRequest) -> tuple[str, str]:
        """Goes on with the text that was read; returns what that says, and why it ended (TurnStats).

        Raises:
            KvlocalError: it cannot be gone on with, or not to the end.
        """
        session, said = self.session, ""
        pieces = session.pieces(request.options)
        answering.can_stop(session.stop)
        try:
            for piece in pieces:
                said += piece.text
                answering.emit(piece)
        finally:
            answering.can_stop(lambda: None)
        assert session.last is not None
        self.usage = replace(self.usage, completion_tokens=session.last.answer_tokens)
        return said, session.last.stop_reason


class Texts:
    """The texts in the slots of an engine. All is called in turns of the slots' scheduler.

    take_slot, give_slot: tell how many slots are free
    """

    def __init__(
        self, slots: Slots, model: Model, config: SessionConfig, take_slot: Callable[[], None], give_slot: Callable[[], None]
    ) -> None:
        self._slots, self._model, self._config = slots, model, config
        self._take_slot, self._give_slot = take_slot, give_slot
        self._idle: list[LiveText] = []

    def take(self, owner: str, tokens: npt.NDArray[np.int32]) -> LiveText:
        """A text of this owner that begins as these tokens do, the one that does so longest, or a new one in a slot of its own. Nobody else has it
        until `release` or `drop`.

        Raises:
            KvlocalError: there is no slot for it, or not enough memory.
        """
        alike = [(n, text.last_used, i) for i, text in enumerate(self._idle) if text.owner == owner and (n := _n_alike(text, tokens))]
        if alike:
            return self._idle.pop(max(alike)[-1])
        self._take_slot()
        try:
            return LiveText(self._slots, self._model, self._config, owner)
        except BaseException:
            self._give_slot()
            raise

    def release(self, text: LiveText) -> None:
        """Others may go on with it."""
        text.last_used = time.monotonic()
        self._idle.append(text)

    def drop(self, text: LiveText) -> None:
        """It is in no slot any more."""
        text.session.close()
        self._give_slot()

    def forget(self, owner: str) -> None:
        """The idle texts of an owner leave their slots."""
        for text in [text for text in self._idle if text.owner == owner]:
            self._idle.remove(text)
            self.drop(text)

    def leave_slot(self) -> bool:
        """The idle one that was used the longest ago leaves its slot; False if there is none."""
        if not self._idle:
            return False
        oldest = min(self._idle, key=lambda text: text.last_used)
        self._idle.remove(oldest)
        self.drop(oldest)
        return True

    def close(self) -> None:
        """Frees all that are idle."""
        while self.leave_slot():
            pass


def _n_alike(text: LiveText, tokens: npt.NDArray[np.int32]) -> int:
    """With how many tokens both begin; 0 if less than half of the shorter one is alike, as for two texts that only begin with the same words."""
    known = text.session.tokens
    n = min(len(known), len(tokens))
    different = np.flatnonzero(known[:n] != tokens[:n])
    alike = int(different[0]) if len(different) else n
    return alike if 2 * alike >= n else 0
