"""Guard: which web pages may use the server, and by which names it may be called."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kvlocal.server.errors import ApiError

# pages of this machine, and those of programs on it, whose schemes are no web pages'
LOCAL_ORIGIN = r"https?://(localhost|[\w-]+\.localhost|127\.0\.0\.1|\[::1\])(:\d+)?|(?!https?:)[a-z][a-z0-9+.-]*://.*"
ANY = "*"


class Guard:
    """Refuses requests of foreign web pages, which a browser sends without asking anybody: a server that wants no key would answer them.

    origins: beside LOCAL_ORIGIN and the server itself, by the address that it is called by; ANY lets all pages in
    hosts: names in the header Host beside addresses, against pages whose own name was turned to this machine's address; None for all
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], hosts: Sequence[str] | None) -> None:
        self._app = app
        self._origins, self._any = frozenset(origins), ANY in origins
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(Headers(scope=scope))
            if refusal is not None:
                await JSONResponse(refusal.body(), refusal.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        origin = headers.get("origin")
        # the server's own page has the address that it is called by, whatever that is
        called = (origin or "").partition("://")[2].lower()
        own = bool(called) and called == headers.get("host", "").lower()
        if origin and not own and not self._any and origin not in self._origins and not re.fullmatch(LOCAL_ORIGIN, origin):
            return ApiError(403, "web pages of this origin may not use the server: start it with --cors-origin ORIGIN, or with a key")
        if self._hosts is not None and not self._is_own(headers.get("host", "")):
            return ApiError(403, "the server is not called by this name: use localhost or an address")
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if self._hosts is None or name in self._hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
