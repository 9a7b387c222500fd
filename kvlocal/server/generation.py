"""Generation: the answers that one request asks an engine for, as events in an event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Generic, NamedTuple, Self, TypeVar

from starlette.requests import ClientDisconnect, Request

from kvlocal.errors import KvlocalError
from kvlocal.openai_forms.chat_reply import Choice
from kvlocal.server.chat_request import answer_requests
from kvlocal.server.errors import ApiError, of_failure
from kvlocal.server.metrics import Metrics
from kvlocal.server.schemas import ChatRequest
from kvlocal.server.service import Service
from kvlocal.serving.answering import Answering
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import AnswerRequest, EngineBusy, Event, Finished, TextRequest

_Result = TypeVar("_Result")
_Request = TypeVar("_Request", AnswerRequest, TextRequest)

_AGAIN_SECONDS = 0.1  # until an engine that was busy is asked again


class Begun(NamedTuple):
    """An answer is worked on now. conversation: the one it belongs to"""

    conversation: str


class Generation(Generic[_Request]):
    """Answers on their way; leaving the block of this context manager cancels those that are not finished.

    The engine has no more of them at once than it answers at once, so that one client's do not fill its queue. Where it takes the first, the others
    follow as soon as there is room for them.

    Args:
        requests: one for each answer.
        metrics: counts what it took.

    Attributes:
        requests: as they were given.

    Raises:
        ApiError: the engine is busy, or closing, or cannot answer this.
    """

    def __init__(self, engine: Engine, requests: Sequence[_Request], metrics: Metrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Begun | Event]] = asyncio.Queue()
        self._engine, self._metrics, self._started = engine, metrics, time.perf_counter()
        self.requests: Sequence[_Request] = requests
        self._to_come: deque[tuple[int, _Request]] = deque(enumerate(requests))
        self._answerings: list[Answering] = []
        self._n_finished = 0
        self._first = True
        self._place: asyncio.Future[tuple[str, int]] = self._loop.create_future()
        try:
            self._submit()
        except EngineBusy as error:
            raise ApiError(503, str(error), code="busy", retry_after=error.retry_after) from None
        except KvlocalError as error:
            raise of_failure(error) from None
        self._submit_others()

    def _submit(self) -> None:
        index, request = self._to_come[0]
        answering = self._engine.submit(request)
        self._to_come.popleft()
        self._answerings.append(answering)
        answering.on_place(partial(self._pass_on_place, index))
        answering.on_event(partial(self._pass_on, index))

    def _submit_others(self) -> None:
        """As many as there is room for.

        Raises:
            ApiError: the engine is closing, or cannot answer one.
        """
        try:
            while self._to_come and self._n_running < self._engine.parallel:
                self._submit()
        except EngineBusy:
            pass
        except KvlocalError as error:
            self.cancel()
            raise of_failure(error) from None

    @property
    def _n_running(self) -> int:
        return len(self._answerings) - self._n_finished

    def _pass_on(self, index: int, event: Begun | Event) -> None:
        """Called in the thread that computes."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    def _pass_on_place(self, index: int, conversation: str, n_messages: int) -> None:
        """Called in the thread that works on the request."""
        if conversation:
            self._pass_on(index, Begun(conversation))
        if index:
            return
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._set_place, (conversation, n_messages))

    def _set_place(self, place: tuple[str, int]) -> None:
        # whoever waits for it may have gone
        if not self._place.done():
            self._place.set_result(place)

    async def place(self) -> tuple[str, int]:
        """The conversation that the first answer is in, and how many messages that has with it; it is known before any event. "" and 0 if the request
        ended before it was worked on."""
        return await self._place

    @property
    def n(self) -> int:
        """How many answers."""
        return len(self.requests)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """As `all_events`, without what comes before the first pieces."""
        async for index, event in self.all_events():
            if not isinstance(event, Begun):
                yield index, event

    async def all_events(self) -> AsyncIterator[tuple[int, Begun | Event]]:
        """The events of all answers as they come, each with the index of its answer, until all are finished.

        Raises:
            ApiError: an answer failed.
        """
        while self._n_finished < self.n:
            if not self._n_running:
                # others were faster
                await asyncio.sleep(_AGAIN_SECONDS)
                self._submit_others()
                continue
            index, event = await self._queue.get()
            if self._first and not isinstance(event, Begun):
                self._first = False
                self._metrics.first_token.observe(time.perf_counter() - self._started)
            if isinstance(event, Finished):
                if event.error is not None:
                    raise of_failure(event.error)
                self._n_finished += 1
                self._submit_others()
            yield index, event

    def cancel(self) -> None:
        """Nobody wants the answers any more."""
        self._to_come.clear()
        for answering in self._answerings:
            answering.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


def chat_generation(service: Service, fields: ChatRequest, owner: str) -> Generation[AnswerRequest]:
    """The answers that the body of a request asks for.

    Raises:
        ApiError: a field has a value that is not possible, or the engine does not take it.
    """
    requests = answer_requests(fields, owner, service.sampling, system=service.engine.config.system, keep_trimmed=service.keep_trimmed)
    return Generation(service.engine, requests, service.metrics)


async def collected(generation: Generation[Any]) -> list[Choice]:
    """All answers, once they are whole.

    Raises:
        ApiError: one failed.
    """
    choices = [Choice() for _ in range(generation.n)]
    async for index, piece in generation.events():
        if isinstance(piece, Finished):
            choices[index].finished = piece
        else:
            choices[index].add(piece)
    return choices


async def unless_gone(request: Request, work: Awaitable[_Result]) -> _Result:
    """The result of work for a client, which is cancelled when the client goes away. The body has to be read already.

    Raises:
        ClientDisconnect: the client went away.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


