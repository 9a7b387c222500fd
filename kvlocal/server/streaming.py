"""Streams of server-sent events, with pings in between."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from sse_starlette import EventSourceResponse, JSONServerSentEvent, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

PING_SECONDS = 15  # clients and proxies give up on connections that are silent for a minute or so
SEND_SECONDS = 60.0  # for a client to take what was sent

DONE = ServerSentEvent("[DONE]", sep="\n")


class Stream(EventSourceResponse):
    """Sends the events of an iterator. A client that takes nothing for SEND_SECONDS is given up, as if it had gone away.

    over: called when the stream is over, however that came
    """

    def __init__(self, events: AsyncIterator[ServerSentEvent], over: Callable[[], None]) -> None:
        super().__init__(events, ping=PING_SECONDS, sep="\n", send_timeout=SEND_SECONDS)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            # uvicorn closes a connection whose response is not complete
            return
        finally:
            self._over()


def event(value: dict[str, Any], name: str | None = None) -> ServerSentEvent:
    """An event with a JSON object."""
    return JSONServerSentEvent(value, event=name, sep="\n")
