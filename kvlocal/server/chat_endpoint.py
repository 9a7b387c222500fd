"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvlocal.openai_forms.chat_reply import ChatReply
from kvlocal.server.body import body_of, fields_of
from kvlocal.server.errors import ApiError
from kvlocal.server.generation import Begun, Generation, chat_generation, collected, unless_gone
from kvlocal.server.schemas import ChatRequest
from kvlocal.server.service import service_of
from kvlocal.server.streaming import DONE, Stream, event
from kvlocal.serving.request import AnswerRequest, Finished


async def chat_completions(request: Request) -> Response:
    """Answers the last turn of a conversation."""
    service = service_of(request)
    owner = service.owner(request)
    fields = fields_of(ChatRequest, await body_of(request))
    generation = chat_generation(service, fields, owner)
    with_usage = fields.stream_options is not None and fields.stream_options.include_usage is True
    reply = ChatReply(service.name, with_logprobs=fields.logprobs is True, with_usage=with_usage)
    if fields.stream:
        return Stream(_chunks(generation, reply), generation.cancel)
    with generation:
        choices = await unless_gone(request, collected(generation))
    return JSONResponse(reply.whole(choices))


async def _chunks(generation: Generation[AnswerRequest], reply: ChatReply) -> AsyncIterator[ServerSentEvent]:
    ends = []
    try:
        async for index, piece in generation.all_events():
            if isinstance(piece, Begun):
                yield event(reply.begin(index, piece.conversation))
            elif isinstance(piece, Finished):
                ends.append(piece)
                yield event(reply.end(index, piece))
            else:
                yield event(reply.piece(index, piece))
    except ApiError as error:
        yield event(error.body())
        return
    if reply.with_usage:
        yield event(reply.usage(ends))
    yield DONE
