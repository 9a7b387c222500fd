"""/conversations: which there are, what was said in one, where it is in the cache, and how to stop its answer or to delete it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvlocal.chat.cache_map import CacheMap
from kvlocal.errors import KvlocalError
from kvlocal.server.errors import ApiError
from kvlocal.server.service import service_of
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import UnknownConversation

_Found = TypeVar("_Found")


async def conversations(request: Request) -> Response:
    """Those of the key that asks, the last used first."""
    service = service_of(request)
    found = await asyncio.to_thread(service.engine.conversations, service.owner(request))
    return JSONResponse({"object": "list", "data": [asdict(each) for each in found]})


async def _of_one(request: Request, method: Callable[[Engine, str, str], _Found]) -> tuple[str, _Found]:
    """The id of the conversation that a request is about, and what a method of the engine gives for it.

    Raises:
        ApiError: the key that asks has none of that name.
    """
    service = service_of(request)
    identity = request.path_params["id"]
    try:
        return identity, await asyncio.to_thread(method, service.engine, identity, service.owner(request))
    except UnknownConversation as error:
        raise ApiError(404, str(error)) from None


async def messages(request: Request) -> Response:
    """What was said in a conversation of the key that asks."""
    identity, said = await _of_one(request, Engine.messages)
    return JSONResponse({"id": identity, "object": "conversation", "messages": said})


async def cache_map(request: Request) -> Response:
    """Where the texts of a conversation of the key that asks are: in the cache, in the archive, or gone; also while an answer comes."""
    identity, view = await _of_one(request, Engine.cache_view)
    head = {"id": identity, "object": "conversation.map", "answering": view.answering, "in_slot": view.in_slot}
    return JSONResponse({**head, **(_mapped(view.map) if view.map else {"cache": None, "attention": None, "parts": []})})


def _mapped(found: CacheMap) -> dict[str, Any]:
    kv, looked = found.kv, found.looked
    return {
        "cache": {
            "budget": kv.budget,
            "used": kv.used,
            "capacity": kv.capacity,
            "tokens": kv.history_tokens,
            "archived": kv.archived,
            "recalled": round(kv.recalled, 1),
            "compressions": kv.compressions,
        },
        "attention": looked
        and {
            "beginning": round(looked.beginning, 4),
            "earlier": round(looked.earlier, 4),
            "current": round(looked.current, 4),
            "everything": looked.everything,
        },
        "parts": [
            {
                "turn": part.turn,
                "role": part.role,
                "text": part.text,
                "tokens": part.tokens,
                "cached": round(part.cached, 1),
                "archived": part.archived,
                "recalled": round(part.recalled, 1),
                "pinned": part.pinned,
                "attention": None if part.attention is None else round(part.attention, 4),
            }
            for part in found.parts
        ],
    }


async def stop(request: Request) -> Response:
    """Ends the answer that is on its way in a conversation of the key that asks; what there is of it stays."""
    identity, stopped = await _of_one(request, Engine.stop)
    return JSONResponse({"id": identity, "object": "conversation", "stopped": stopped})


async def delete(request: Request) -> Response:
    """Deletes a conversation of the key that asks."""
    try:
        identity, _ = await _of_one(request, Engine.delete)
    except KvlocalError as error:
        raise ApiError(409, str(error)) from None
    return JSONResponse({"id": identity, "object": "conversation", "deleted": True})
