"""/conversations: which there are, and how to delete one."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvlocal.errors import KvlocalError
from kvlocal.server.errors import ApiError
from kvlocal.server.service import service_of
from kvlocal.serving.request import UnknownConversation


async def conversations(request: Request) -> Response:
    """Those of the key that asks, the last used first."""
    service = service_of(request)
    found = await asyncio.to_thread(service.engine.conversations, service.owner(request))
    return JSONResponse({"object": "list", "data": [asdict(each) for each in found]})


async def messages(request: Request) -> Response:
    """What was said in a conversation of the key that asks."""
    service = service_of(request)
    identity = request.path_params["id"]
    try:
        said = await asyncio.to_thread(service.engine.messages, identity, service.owner(request))
    except UnknownConversation as error:
        raise ApiError(404, str(error)) from None
    return JSONResponse({"id": identity, "object": "conversation", "messages": said})


async def delete(request: Request) -> Response:
    """Deletes a conversation of the key that asks."""
    service = service_of(request)
    identity = request.path_params["id"]
    try:
        await asyncio.to_thread(service.engine.delete, identity, service.owner(request))
    except UnknownConversation as error:
        raise ApiError(404, str(error)) from None
    except KvlocalError as error:
        raise ApiError(409, str(error)) from None
    return JSONResponse({"id": identity, "object": "conversation", "deleted": True})
