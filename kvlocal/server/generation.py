"""Generation: the answers that one request asks an engine for, as events in an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Self, TypeVar

from starlette.requests import ClientDisconnect, Request

from kvlocal.errors import KvlocalError
from kvlocal.server.chat_reply import Choice
from kvlocal.server.chat_request import answer_requests
from kvlocal.server.errors import ApiError, of_failure
from kvlocal.server.metrics import Metrics
from kvlocal.server.schemas import ChatRequest
from kvlocal.server.service import Service
from kvlocal.serving.answering import Answering
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import AnswerRequest, EngineBusy, Event, Finished

_Result = TypeVar("_Result")


class Begun(NamedTuple):
    """An answer is worked on now. conversation: the one it belongs to"""

    conversation: str


class Generation:
    """Answers on their way; leaving the block of this context manager cancels those that are not finished.

    Args:
        requests: one for each answer; all of them are taken, or none.
        metrics: counts what it took.

    Attributes:
        requests: as they were given.

    Raises:
        ApiError: the engine is busy, or closing, or cannot answer this.
    """

    def __init__(self, engine: Engine, requests: Sequence[AnswerRequest], metrics: Metrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Begun | Event]] = asyncio.Queue()
        self._metrics, self._started = metrics, time.perf_counter()
        self.requests = requests
        self._answerings: list[Answering] = []
        self._first = True
        try:
            for request in requests:
                self._answerings.append(engine.submit(request))
        except EngineBusy as error:
            self.cancel()
            raise ApiError(503, str(error), code="busy", retry_after=error.retry_after) from None
        except KvlocalError as error:
            self.cancel()
            raise of_failure(error) from None
        for index, answering in enumerate(self._answerings):
            pass_on = partial(self._pass_on, index)
            answering.on_event(pass_on, lambda conversation, pass_on=pass_on: pass_on(Begun(conversation)))  # type: ignore[misc]

    def _pass_on(self, index: int, event: Begun | Event) -> None:
        """Called in the thread that computes."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

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
        for _ in self._answerings:
            while True:
                index, event = await self._queue.get()
                if self._first and not isinstance(event, Begun):
                    self._first = False
                    self._metrics.first_token.observe(time.perf_counter() - self._started)
                if isinstance(event, Finished):
                    if event.error is not None:
                        raise of_failure(event.error)
                    yield index, event
                    break
                yield index, event

    def cancel(self) -> None:
        """Nobody wants the answers any more."""
        for answering in self._answerings:
            answering.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


def chat_generation(service: Service, fields: ChatRequest, owner: str) -> Generation:
    """The answers that the body of a request asks for.

    Raises:
        ApiError: a field has a value that is not possible, or the engine does not take it.
    """
    requests = answer_requests(fields, owner, service.sampling, system=service.engine.config.system, keep_trimmed=service.keep_trimmed)
    return Generation(service.engine, requests, service.metrics)


async def collected(generation: Generation) -> list[Choice]:
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


