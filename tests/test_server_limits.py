"""Slow senders and silent connections are given up on: uvicorn with our protocol, and an application that does no more than read bodies."""

import asyncio
import socket
import threading
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from kvlocal.server import body, serving
from kvlocal.server.errors import ApiError

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"


async def size(request):
    return JSONResponse(len(await body.body_of(request)))


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(serving, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(body, "PIECE_SECONDS", 0.5)
    monkeypatch.setattr(body, "BODY_SECONDS", 1.5)
    monkeypatch.setattr(body, "MAX_BYTES", 1000)

    async def refused(_request, error):
        return JSONResponse(error.body(), error.status, error.headers)

    app = Starlette(routes=[Route("/", size, methods=["POST"])], exception_handlers={ApiError: refused})
    listening = serving.listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, http=serving._Protocol, lifespan="off", log_config=None, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    listening.close()


def exchange(port, *pieces, pause=0.0):
    """All that comes back until the other side closes, and after how many seconds."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            while data := connection.recv(65536):
                answer += data
        except (BrokenPipeError, ConnectionResetError):
            pass
    return answer, time.monotonic() - started


def test_what_comes_in_time_is_answered(port):
    answer, _ = exchange(port, HEAD.replace(b"Host: x", b"Host: x\r\nConnection: close"), b"01234", b"56789", pause=0.1)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"10")


@pytest.mark.parametrize("pieces", [(b"",), (b"POST / HT",), (b"POST / HTTP/1.1\r\n", b"A: b\r\n", b"C: d\r\n")])
def test_a_header_that_does_not_come(port, pieces):
    answer, seconds = exchange(port, *pieces, pause=0.1)
    assert answer == b"" and 0.4 < seconds < 3


def test_a_second_request_that_does_not_come(port):
    first = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
    answer, seconds = exchange(port, first, b"POST / HT", pause=0.1)
    assert answer.startswith(b"HTTP/1.1 200") and seconds < 3


def test_a_body_that_does_not_come(port):
    answer, seconds = exchange(port, HEAD + b"0")
    assert answer.startswith(b"HTTP/1.1 408") and seconds < 3


def test_a_body_that_comes_byte_by_byte(port):
    answer, seconds = exchange(port, HEAD, *([b"0"] * 5), pause=0.25)
    assert answer.startswith(b"HTTP/1.1 408") and 1.4 < seconds < 5


def test_a_body_that_is_too_large_without_saying_so(port):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer, seconds = exchange(port, head + (b"1f4\r\n" + b"x" * 500 + b"\r\n") * 3)
    assert answer.startswith(b"HTTP/1.1 413") and seconds < 3
