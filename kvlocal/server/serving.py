"""Serves a model: listening, limits of connections, and a clean end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import h11
import uvicorn
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.server.app import make_app
from kvlocal.server.keys import Keys
from kvlocal.server.metrics import Metrics
from kvlocal.server.service import Service
from kvlocal.serving.engine import Engine

HEADER_SECONDS = 20.0  # from the first byte of a request, or from the connection, to the end of the request's header
MAX_CONNECTIONS = 512
MAX_HEADER = 32 << 10  # bytes
GRACE_SECONDS = 10.0  # for answers that are on their way when the server ends


class ServeError(KvlocalError):
    """The server cannot listen where it is to."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ServeError: the address is not this machine's, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"{host} is no address of this machine: give --host 127.0.0.1, or 0.0.0.0 for all there are") from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(MAX_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise ServeError(f"the server cannot listen on {host}, port {port} ({error.strerror}): choose another --port, or --port 0") from error
    return listening


def address_of(listening: socket.socket, host: str) -> str:
    """The URL that reaches a listening socket."""
    port = listening.getsockname()[1]
    if host in ("0.0.0.0", "::", ""):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_model(
    model: Model,
    config: SessionConfig,
    listening: socket.socket,
    *,
    name: str,
    nexus: NexusTokens | None = None,
    parallel: int = 1,
    waiting: int = 16,
    directory: Path | None = None,
    disk: int = 2**34,
    api_keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    host: str = "",
    keep_trimmed: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves a model until SIGINT or SIGTERM. Answers that are on their way then have GRACE_SECONDS to end.

    Args:
        config: of every conversation; its system prompt is that of the conversations that have none.
        listening: of `listen`.
        name: by which clients know the model.
        nexus, parallel, waiting, directory, disk: as Engine has them.
        api_keys: those that may use it; with none everybody may.
        origins: web pages that may use it, beside those of this machine.
        host: a name by which it may be called, besides addresses and localhost.
        keep_trimmed: as AnswerRequest has it.
        ready: called once connections are taken.

    Raises:
        KvlocalError: no conversation is possible with this configuration, or there is not enough memory.
    """
    with Engine(model, config, parallel=parallel, waiting=waiting, directory=directory, disk=disk, nexus=nexus) as engine:
        # a page of the web whose name was turned to this machine's address has the key only if it was told it
        hosts = None if api_keys else (host, socket.gethostname())
        service = Service(name, model, engine, Keys(api_keys), Metrics(engine.stats), keep_trimmed, tuple(origins), hosts)
        _serve(make_app(service), listening, engine.close, ready)


def _serve(app: ASGIApp, listening: socket.socket, close_engine: Callable[[float], None], ready: Callable[[], None]) -> None:
    # it would end streams at once; here they have time until the engine has ended the answers
    AppStatus.disable_automatic_graceful_drain()
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(GRACE_SECONDS) + 5,
        h11_max_incomplete_event_size=MAX_HEADER,
    )
    # uvicorn sends itself the signal again that has ended it, which would end the program before its files are closed
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _Server(config, close_engine, ready).run([listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, close_engine: Callable[[float], None], ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._close_engine, self._ready = close_engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self._close_engine, GRACE_SECONDS))
        await super().shutdown(sockets)
        await closing


class _Protocol(H11Protocol):
    """Gives up on a connection whose request does not come: its header has to be there within HEADER_SECONDS, and so has the rest of a body that was
    answered before it was there."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch(self) -> None:
        waits = self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE
        if not waits or self.transport.is_closing():
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()
