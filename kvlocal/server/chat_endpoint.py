"""/v1/chat/completions."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from kvlocal.openai_forms.chat_reply import ChatReply
from kvlocal.server.body import body_of, fields_of
from kvlocal.server.generation import chat_generation
from kvlocal.server.replying import replied
from kvlocal.server.schemas import ChatRequest
from kvlocal.server.service import service_of


async def chat_completions(request: Request) -> Response:
    """Answers the last turn of a conversation."""
    service = service_of(request)
    owner = service.owner(request)
    fields = fields_of(ChatRequest, await body_of(request))
    generation = chat_generation(service, fields, owner)
    reply = ChatReply(service.name, with_logprobs=fields.logprobs is True, with_usage=fields.with_usage)
    return await replied(request, generation, reply, fields.stream, reply.begin)
