"""The page at `/`: a chat with the map of its cache, in files of the package."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_HEADERS = {
    # what a model says is text of strangers: nothing in it may run, load anything, or be put into a frame
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def index(request: Request) -> Response:
    """The page itself; it needs no key, and asks for one where the server does."""
    return _response(request, "index.html")


async def file(request: Request) -> Response:
    """What the page loads."""
    return _response(request, request.path_params["name"])


def _response(request: Request, name: str) -> Response:
    try:
        data, kind, tag = _files()[name]
    except KeyError:
        raise HTTPException(404) from None
    headers = _HEADERS | {"ETag": tag}
    if tag in (each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Each file by its name: what is in it, its type, and its tag."""
    found = {}
    for each in (files("kvlocal.server") / "page").iterdir():
        suffix = each.name[each.name.rfind(".") :]
        if suffix in _TYPES:
            data = each.read_bytes()
            found[each.name] = data, _TYPES[suffix], f'"{sha256(data).hexdigest()[:16]}"'
    return found
