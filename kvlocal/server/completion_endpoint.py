"""/v1/completions."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from kvlocal.openai_forms.completion_reply import CompletionReply
from kvlocal.server.body import body_of, fields_of
from kvlocal.server.completion_request import text_requests
from kvlocal.server.generation import Generation
from kvlocal.server.replying import replied
from kvlocal.server.schemas import CompletionRequest
from kvlocal.server.service import Service, service_of
from kvlocal.serving.request import TextRequest


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
        with_usage=fields.with_usage,
    )
    return await replied(request, generation, reply, fields.stream)


def _length(service: Service, request: TextRequest) -> int:
    """Characters of a text."""
    return len(request.prompt if isinstance(request.prompt, str) else service.model.detokenize(request.prompt, special=True))
