"""Replying in OpenAI's forms: whole, or chunk by chunk as answers come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal.openai_forms.chat_reply import Choice
from kvlocal.server.errors import ApiError
from kvlocal.server.generation import Begun, Generation, collected, unless_gone
from kvlocal.server.streaming import DONE, Stream, event
from kvlocal.serving.request import Finished


class Reply(Protocol):
    """What answers are told as (kvlocal.openai_forms)."""

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what they took."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]: ...

    def piece(self, index: int, piece: AnswerPiece) -> dict[str, Any]: ...

    def end(self, index: int, finished: Finished) -> dict[str, Any]: ...

    def usage(self, ends: Sequence[Finished]) -> dict[str, Any]: ...


async def replied(
    request: Request, generation: Generation[Any], reply: Reply, stream: bool | None, begin: Callable[[int, str], dict[str, Any]] | None = None
) -> Response:
    """The response to a request, when all answers are there, or a stream of them.

    begin: the first chunk of an answer, by its index and conversation; None for no such chunk

    Raises:
        ApiError: an answer failed; in a stream that is its last event.
    """
    if stream:
        return Stream(_chunks(generation, reply, begin), generation.cancel)
    with generation:
        choices = await unless_gone(request, collected(generation))
    return JSONResponse(reply.whole(choices))


async def _chunks(
    generation: Generation[Any], reply: Reply, begin: Callable[[int, str], dict[str, Any]] | None
) -> AsyncIterator[ServerSentEvent]:
    ends: dict[int, Finished] = {}
    try:
        async for index, piece in generation.all_events():
            if isinstance(piece, Begun):
                if begin:
                    yield event(begin(index, piece.conversation))
            elif isinstance(piece, Finished):
                ends[index] = piece
                yield event(reply.end(index, piece))
            else:
                yield event(reply.piece(index, piece))
    except ApiError as error:
        yield event(error.body())
        return
    if reply.with_usage:
        yield event(reply.usage([ends[index] for index in sorted(ends)]))
    yield DONE
