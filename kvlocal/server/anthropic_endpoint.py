"""/v1/messages, Anthropic's API."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvlocal.server.anthropic_reply import AnthropicReply, anthropic_error
from kvlocal.server.anthropic_request import AnthropicRequest, chat_request
from kvlocal.server.body import body_of, fields_of
from kvlocal.server.errors import ApiError
from kvlocal.server.generation import Generation, chat_generation, collected, unless_gone
from kvlocal.server.service import service_of
from kvlocal.server.streaming import Stream, event
from kvlocal.serving.request import AnswerRequest, Finished


async def messages(request: Request) -> Response:
    """Answers the last turn of a conversation; what is wrong is told in Anthropic's format."""
    try:
        return await _messages(request)
    except ApiError as error:
        return JSONResponse(anthropic_error(error), error.status, error.headers)


async def _messages(request: Request) -> Response:
    service = service_of(request)
    owner = service.owner(request)
    fields = fields_of(AnthropicRequest, await body_of(request))
    generation = chat_generation(service, chat_request(fields), owner)
    reply = AnthropicReply(service.name)
    if fields.stream:
        return Stream(_events(generation, reply), generation.cancel)
    with generation:
        (choice,) = await unless_gone(request, collected(generation))
    return JSONResponse(reply.whole(choice))


async def _events(generation: Generation[AnswerRequest], reply: AnthropicReply) -> AsyncIterator[ServerSentEvent]:
    yield _named(reply.begin())
    try:
        async for _, piece in generation.events():
            for each in reply.end(piece) if isinstance(piece, Finished) else reply.piece(piece):
                yield _named(each)
    except ApiError as error:
        yield _named(anthropic_error(error))


def _named(value: dict[str, object]) -> ServerSentEvent:
    return event(value, str(value["type"]))
