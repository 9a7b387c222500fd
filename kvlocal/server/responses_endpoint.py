"""/v1/responses, OpenAI's newer API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvlocal.server.body import body_of, fields_of
from kvlocal.server.errors import ApiError
from kvlocal.server.generation import Generation, chat_generation, collected, unless_gone
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
    earlier = service.responses.messages(owner, wanted) if wanted else ()
    if earlier is None:
        raise ApiError(404, "previous_response_id is none that this server still knows: send the whole conversation", param="previous_response_id")
    asked = chat_request(fields, earlier)
    generation = chat_generation(service, asked, owner)
    reply = ResponsesReply(service.name, fields)

    def keep() -> None:
        service.responses.keep(owner, reply.id, [*generation.requests[0].messages, reply.message])

    if fields.stream:
        return Stream(_events(generation, reply, keep), generation.cancel)
    with generation:
        (choice,) = await unless_gone(request, collected(generation))
    reply.take(choice)
    keep()
    return JSONResponse(reply.response())


async def _events(generation: Generation[AnswerRequest], reply: ResponsesReply, keep: Callable[[], None]) -> AsyncIterator[ServerSentEvent]:
    for each in reply.begin():
        yield _named(each)
    try:
        async for _, piece in generation.events():
            if isinstance(piece, Finished):
                # before it is told: with what a client has it can go on
                last = list(reply.end(piece))
                keep()
                for each in last:
                    yield _named(each)
            else:
                for each in reply.piece(piece):
                    yield _named(each)
    except ApiError as error:
        yield _named(reply.fail(error))


def _named(value: dict[str, object]) -> ServerSentEvent:
    return event(value, str(value["type"]))
