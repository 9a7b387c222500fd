"""Engine: answers requests, several at once, each in the conversation that it belongs to."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

from kvlocal.cache.fitting import fitted
from kvlocal.chat.beside import slots_for
from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.text_session import Prompt, prompt_tokens
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.llama.scheduler import Stopped
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.serving.answering import Answering
from kvlocal.serving.chain import owner_digest
from kvlocal.serving.conversation import Checkpoint, ConversationInfo, KeptConversation
from kvlocal.serving.embeddings import Embedded, Embeddings
from kvlocal.serving.keeper import Keeper
from kvlocal.serving.live import Cancelled
from kvlocal.serving.request import AnswerRequest, EngineBusy, EngineClosed, Finished, TextRequest, UnknownConversation, Usage
from kvlocal.serving.shown_map import CacheView
from kvlocal.serving.stats import EngineStats, Totals
from kvlocal.template.markup import Message

_POLL_SECONDS = 0.1  # of the driver while nothing happens
_TOKEN_SHARE = 0.5  # of the time that answers get while prompts are read beside them
_LEAVE_SECONDS = 5.0  # for answers that were stopped to end

_log = logging.getLogger(__name__)


class Engine:
    """Answers requests with one model, `parallel` of them at once, the others in the order in which they came. In the same way it goes on with texts.

    One thread computes, as kvlocal.llama.scheduler says; each request that is worked on has one more, in which it takes turns with the others. A
    long prompt is read micro-batch by micro-batch, and after each of them the others get tokens for as long as it took. What goes wrong
    with a request is told in its Finished, and concerns no other.

    model: the weights; must outlive the engine
    config: of every conversation, but for the system prompt, which is the conversation's own; the memory for archives is for those in slots together
    parallel: conversations that are in slots at once
    waiting: requests that may wait for one
    directory: where the conversations are kept, so that another engine goes on with them; None for in memory alone
    idle_ram: bytes that conversations may take in memory while they are in no slot; beyond that the oldest are on the disk alone, or gone
    disk: bytes that all may take on the disk; beyond that the oldest are deleted
    nexus: for the policies that need Nexus tokens

    Raises:
        KvlocalError: no conversation is possible with this configuration, or there is not enough memory. Nothing is left open then.
    """

    def __init__(
        self,
        model: Model,
        config: SessionConfig,
        *,
        parallel: int = 1,
        waiting: int = 16,
        directory: Path | None = None,
        idle_ram: int = 2**31,
        disk: int = 2**34,
        nexus: NexusTokens | None = None,
    ) -> None:
        self.model, self.config = model, fitted(model.path, config, model.placement)
        self._n_waiting = waiting
        self._slots, self.budget = slots_for(parallel, model, self.config, nexus, _TOKEN_SHARE)
        self.config = self.config.shared_by(parallel)
        self._kv_bytes = self._slots.kv_bytes()
        try:
            self._keeper = Keeper(self._slots, parallel, model, self.config, nexus, directory, idle_ram, disk)
        except BaseException:
            self._slots.close()
            raise
        self._embeddings = Embeddings(model, self._slots.scheduler, waiting + parallel, config.n_threads)
        # guards what follows
        self._changed = threading.Condition()
        self._queue: deque[Answering] = deque()
        self._running: set[Answering] = set()
        self._closing = False
        self._totals = Totals()
        self._seconds = 1.0  # that a request takes, a moving average
        self._driving = True
        self._driver = threading.Thread(target=self._drive, name="kvlocal-driver", daemon=True)
        self._workers = [threading.Thread(target=self._work, name=f"kvlocal-{i}", daemon=True) for i in range(parallel)]
        for thread in (self._driver, *self._workers):
            thread.start()

    @property
    def parallel(self) -> int:
        """How many requests are answered at once."""
        return len(self._workers)

    def submit(self, request: AnswerRequest | TextRequest) -> Answering:
        """Takes a request; the answer, or what goes on with the text, comes as events of what it returns.

        Raises:
            EngineBusy: too many wait already.
            KvlocalError: the engine is closed, or the last message is none that can be answered.
        """
        if isinstance(request, AnswerRequest) and (not request.messages or request.messages[-1]["role"] not in ("user", "tool")):
            raise SessionError("there is no turn to answer: the last message must be one of the user")
        answering = Answering(request, self._leave_queue)
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine is closing: start it again")
            free = len(self._workers) - len(self._running)
            if len(self._queue) >= self._n_waiting + free:
                raise EngineBusy(max(1.0, self._seconds * (len(self._queue) + 1) / len(self._workers)))
            self._queue.append(answering)
            self._changed.notify()
        return answering

    def embed(self, texts: Sequence[Prompt], gone: threading.Event) -> Future[list[Embedded]]:
        """Embeds texts, or their tokens, beside the requests and in no slot; the result has one for each.

        Args:
            gone: set when nobody waits for it any more.

        Raises:
            EngineBusy: too many wait already.
            EngineClosed: the engine is closed.
        """
        return self._embeddings.submit(texts, gone)

    def conversations(self, owner: str | None = None) -> list[ConversationInfo]:
        """What is kept, the last used first: of one owner, or of all if None."""
        kept = [one for one in self._keeper.conversations if owner is None or one.owner == owner_digest(owner)]
        return [ConversationInfo.of(one) for one in sorted(kept, key=lambda one: -one.last_used)]

    def messages(self, conversation: str, owner: str) -> list[Message]:
        """What was said in a conversation, its system prompt first if it has one.

        Raises:
            UnknownConversation: this owner has none of that name.
        """
        found = self._of(conversation, owner)
        system: list[Message] = [] if found.system is None else [{"role": "system", "content": found.system}]
        return system + [dict(turn) for turn in found.turns]

    def cache_view(self, conversation: str, owner: str) -> CacheView:
        """Where the texts of a conversation are, also while it is answered: nobody waits for the answer, and it not for who looks.

        Raises:
            UnknownConversation: this owner has none of that name.
            KvlocalError: the engine is closed.
        """
        found = self._of(conversation, owner)
        latest, shown = found.shown.look(), found.shown
        if found.live and not found.answering and not shown.looked_closely:
            with self._turn():
                # it may have begun to answer meanwhile, or left its slot
                if found.live and not found.answering and not found.live.session.cache.uncertain:
                    shown.settle(found.live.map(closely=True), looked_closely=True)
                    latest = shown.settled
        return CacheView(found.answering is not None, found.live is not None, latest)

    def stop(self, conversation: str, owner: str) -> bool:
        """Ends the answer that is on its way in a conversation, as Answering.cancel does; whether there was one.

        Raises:
            UnknownConversation: this owner has none of that name.
        """
        answering = self._of(conversation, owner).answering
        if answering is not None:
            answering.cancel()
        return answering is not None

    def delete(self, conversation: str, owner: str) -> None:
        """Removes a conversation, in memory and on the disk.

        Raises:
            UnknownConversation: this owner has none of that name.
            KvlocalError: it is being answered, or it cannot be removed.
        """
        found = self._of(conversation, owner)
        with self._turn():
            self._keeper.delete(found)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """A turn for a thread that answers nothing."""
        try:
            with self._slots.scheduler.turn():
                yield
        except Stopped:
            raise SessionError("the engine is closed: start it again") from None

    def forget(self, owner: str) -> None:
        """Removes all conversations of an owner, and what is in slots of other texts.

        Raises:
            KvlocalError: one of them is being answered, or cannot be removed.
        """
        for info in self.conversations(owner):
            self.delete(info.id, owner)
        try:
            with self._slots.scheduler.turn():
                self._keeper.texts.forget(owner_digest(owner))
        except Stopped:
            raise SessionError("the engine is closed: start it again") from None

    def checkpoint(self, conversation: str, owner: str) -> Checkpoint:
        """A conversation as it is now, for `take_up`.

        Raises:
            UnknownConversation: this owner has none of that name.
            SessionError: it is being answered.
        """
        found = self._of(conversation, owner)
        with self._keeper.conversations.lock:
            if found.answering:
                raise SessionError(f"the conversation {conversation} is being answered: stop that first, or wait for it")
            return found.checkpoint()

    def take_up(self, checkpoint: Checkpoint, owner: str) -> None:
        """Requests can go on from there again, whatever became of the conversation; it is kept in memory alone."""
        self._keeper.take_up(checkpoint, owner_digest(owner))

    def _of(self, conversation: str, owner: str) -> KeptConversation:
        found = self._keeper.conversations.get(conversation, owner_digest(owner))
        if found is None:
            raise UnknownConversation(f"there is no conversation {conversation[:60]}: the list of conversations shows those there are")
        return found

    def stats(self) -> EngineStats:
        """The engine in numbers."""
        infos = self.conversations()
        with self._changed:
            return EngineStats(
                parallel=len(self._workers),
                running=len(self._running),
                waiting=len(self._queue),
                embedding=self._embeddings.n_requests,
                conversations=len(infos),
                in_slots=sum(info.in_slot for info in infos),
                kv_bytes=self._kv_bytes,
                bytes_in_memory=self._keeper.conversations.bytes_in_memory(),
                bytes_on_disk=sum(info.bytes_on_disk for info in infos),
                **asdict(self._totals),
            )

    def _leave_queue(self, answering: Answering) -> None:
        """A request that waits does so no more."""
        with self._changed:
            if answering not in self._queue:
                return
            self._queue.remove(answering)
        answering.emit(_without_answer())

    # the threads

    def _drive(self) -> None:
        scheduler = self._slots.scheduler
        while self._driving:
            scheduler.advance(_POLL_SECONDS)
        scheduler.stop()

    def _work(self) -> None:
        while (answering := self._next()) is not None:
            started = time.perf_counter()
            finished = self._finished(answering)
            with self._changed:
                self._running.discard(answering)
                self._seconds += (time.perf_counter() - started - self._seconds) / 8
                self._totals.count(finished)
                self._changed.notify_all()
            answering.emit(finished)

    def _next(self) -> Answering | None:
        """The request that has waited longest; None when there will be none any more."""
        with self._changed:
            while not self._queue:
                if self._closing:
                    return None
                self._changed.wait()
            answering = self._queue.popleft()
            self._running.add(answering)
            return answering

    def _finished(self, answering: Answering) -> Finished:
        """Carries a request out; what goes wrong is in the result."""
        request = answering.request
        try:
            return self._go_on(answering, request) if isinstance(request, TextRequest) else self._answer(answering, request)
        except (Stopped, Cancelled):
            return _without_answer()
        except KvlocalError as error:
            return _without_answer(error)
        except Exception as error:  # noqa: BLE001 - a fault in the program concerns this request alone
            _log.exception("a request failed")
            return _without_answer(KvlocalError(f"the answer failed by a fault in kvlocal ({type(error).__name__}): try again"))

    def _go_on(self, answering: Answering, request: TextRequest) -> Finished:
        texts, turn = self._keeper.texts, self._slots.scheduler.turn
        tokens = prompt_tokens(self.model, request.prompt)
        with turn():
            text = texts.take(owner_digest(request.owner), tokens)
            try:
                text.read(answering, request, tokens)
                said, reason = text.go_on(answering, request) if request.draws else ("", "length")
            except Cancelled:
                texts.release(text)
                raise
            except BaseException:
                texts.drop(text)
                raise
            texts.release(text)
        return Finished({"role": "assistant", "content": said}, reason, text.usage)

    def _answer(self, answering: Answering, request: AnswerRequest) -> Finished:
        keeper, turn = self._keeper, self._slots.scheduler.turn
        assignment = keeper.take(answering, request)
        conversation, error = assignment.conversation, None
        answering.put(conversation.id, len(assignment.turns) + 1)
        try:
            try:
                live = keeper.seat(assignment)
                with turn():
                    live.read(answering, assignment.turns, assignment.n_known)
                keeper.note_turns(assignment)
                with turn():
                    try:
                        live.answer(answering, conversation.record.add_piece if conversation.record else lambda text: None)
                    except KvlocalError as failure:
                        if live.session.messages[-1]["role"] != "assistant":
                            raise
                        error = failure
                    last, message = live.session.last, dict(live.session.messages[-1])
                    keeper.capture(conversation)
            except Exception:
                with turn():
                    keeper.give_up(assignment)
                raise
            reason = "error" if error or not last else last.stop_reason
            if conversation.record:
                try:
                    conversation.record.end_answer(reason, last.drawn if last else (), conversation.n_tokens, message)
                except KvlocalError as failure:
                    error = error or failure
        finally:
            keeper.release(conversation)
        return Finished(message, reason, live.usage, conversation.id, len(conversation.turns), error)

    # the end

    def close(self, grace_seconds: float = 0.0) -> None:
        """Takes no more requests, gives the running answers so much time, stops them where they are, and frees everything. Those that wait end
        without an answer. Closing twice is harmless."""
        until = time.monotonic() + grace_seconds
        with self._changed:
            self._closing = True
            waiting = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for answering in waiting:
            answering.emit(_without_answer(EngineClosed("the engine is closing: ask again when it has started anew")))
        if not self._wait_until_idle(grace_seconds):
            with self._changed:
                running = list(self._running)
            for answering in running:
                answering.cancel()
            self._wait_until_idle(_LEAVE_SECONDS)
        self._embeddings.close(max(0.0, until - time.monotonic()))
        self._driving = False
        for thread in (self._driver, *self._workers):
            thread.join()
        self._keeper.close()
        self._slots.close()

    def _wait_until_idle(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _without_answer(error: KvlocalError | None = None) -> Finished:
    return Finished({"role": "assistant", "content": ""}, "error" if error else "stopped", Usage(), error=error)
