"""/v1/responses, OpenAI's newer API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvlocal.server.body import body_of, fields_of
from kvlocal.server.errors import ApiError
from kvlocal.server.generation import Generation, chat_generation, collected, unless_gone
from kvlocal.server.response_names import messages_up_to, response_name
from kvlocal.server.responses_reply import ResponsesReply
from kvlocal.server.responses_request import ResponsesRequest, chat_request
from kvlocal.server.service import service_of
from kvlocal.server.streaming import Stream, event
from kvlocal.serving.request import AnswerRequest, Finished


async def responses(request: Request) -> Response:
    """Answers the last turn of a conversation, which may be one that an earlier response stands for."""
    service = service_of(request)
    owner = service.owner(request)
    fields = fields_of(ResponsesRequest, await body_of(request))
    wanted = fields.previous_response_id
    earlier = await asyncio.to_thread(messages_up_to, service.engine, owner, wanted) if wanted else ()
    if earlier is None:
        raise ApiError(404, "previous_response_id is none that this server still knows: send the whole conversation", param="previous_response_id")
    asked = chat_request(fields, earlier)
    generation = chat_generation(service, asked, owner)
    if fields.stream:
        return Stream(_events(generation, service.name, fields), generation.cancel)
    with generation:
        (choice,) = await unless_gone(request, collected(generation))
    reply = ResponsesReply(service.name, fields, response_name(*await generation.place()))
    reply.take(choice)
    return JSONResponse(reply.response())


async def _events(generation: Generation[AnswerRequest], model: str, fields: ResponsesRequest) -> AsyncIterator[ServerSentEvent]:
    reply = ResponsesReply(model, fields, response_name(*await generation.place()))
    for each in reply.begin():
        yield _named(each)
    try:
        async for _, piece in generation.events():
            for each in reply.end(piece) if isinstance(piece, Finished) else reply.piece(piece):
                yield _named(each)
    except ApiError as error:
        yield _named(reply.fail(error))


def _named(value: dict[str, object]) -> ServerSentEvent:
    return event(value, str(value["type"]))
