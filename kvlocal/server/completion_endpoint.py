"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvlocal.openai_forms.completion_reply import CompletionReply
from kvlocal.server.body import body_of, fields_of
from kvlocal.server.completion_request import text_requests
from kvlocal.server.errors import ApiError
from kvlocal.server.generation import Generation, collected, unless_gone
from kvlocal.server.schemas import CompletionRequest
from kvlocal.server.service import Service, service_of
from kvlocal.server.streaming import DONE, Stream, event
from kvlocal.serving.request import Finished, TextRequest


async def completions(request: Request) -> Response:
    """Goes on with texts, as they are and without a chat template."""
    service = service_of(request)
    owner = service.owner(request)
    fields = fields_of(CompletionRequest, await body_of(request))
    requests = text_requests(fields, owner, service.sampling, service.model.n_vocab)
    generation = Generation(service.engine, requests, service.metrics)
    reply = CompletionReply(
        service.name,
        [_length(service, each) if fields.logprobs is not None else 0 for each in requests],
        n=fields.n or 1,
        echo=fields.echo is True,
        with_logprobs=fields.logprobs is not None,
        with_usage=fields.stream_options is not None and fields.stream_options.include_usage is True,
    )
    if fields.stream:
        return Stream(_chunks(generation, reply), generation.cancel)
    with generation:
        choices = await unless_gone(request, collected(generation))
    return JSONResponse(reply.whole(choices))


async def _chunks(generation: Generation[TextRequest], reply: CompletionReply) -> AsyncIterator[ServerSentEvent]:
    ends: dict[int, Finished] = {}
    try:
        async for index, piece in generation.events():
            if isinstance(piece, Finished):
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


def _length(service: Service, request: TextRequest) -> int:
    """Characters of a text."""
    return len(request.prompt if isinstance(request.prompt, str) else service.model.detokenize(request.prompt, special=True))
