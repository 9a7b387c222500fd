"""/conversations: which there are, and how to delete one."""

from __future__ import annotations

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvlocal.server.errors import ApiError
from kvlocal.server.service import service_of


async def conversations(request: Request) -> Response:
    """Those of the key that asks."""
    service = service_of(request)
    owner = service.owner(request)
    data = [asdict(found) for found in service.engine.conversations() if found.owner == owner]
    for each in data:
        del each["owner"]
    return JSONResponse({"object": "list", "data": data})


async def delete(request: Request) -> Response:
    """Deletes a conversation of the key that asks."""
    service = service_of(request)
    identity = request.path_params["id"]
    if not service.engine.delete(identity, service.owner(request)):
        raise ApiError(404, "there is no such conversation: /conversations lists what there is")
    return JSONResponse({"id": identity, "object": "conversation", "deleted": True})
