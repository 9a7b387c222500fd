"""A server in a process of its own, and requests to it without a client's library."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

# small and quick: answers of a few tokens, one thread
OPTIONS = ("--kv-budget", "512", "--threads", "1", "--max-tokens", "12", "--temp", "0", "--archive", "ram", "--archive-ram", "200")


class ServerProcess:
    """`kvlocal serve` on a free port, until the block ends.

    Attributes:
        address: its URL.
        port: its port.
        log: what it has written to stderr so far.
    """

    def __init__(self, model: Path | str, *options: str, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvlocal_cli", "serve", str(model), "--port", "0", *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )  # fmt: skip
        self.pid, self._lines = self._process.pid, []
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._is_ready.wait(120) or "served at" not in self.log:
            self.kill()
            raise AssertionError(f"the server did not start: {self.log}")
        found = re.search(r"served at (http://\S+?:(\d+));", self.log)
        assert found is not None
        self.address, self.port = found[1], int(found[2])

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if "served at" in line:
                self._is_ready.set()
        self._is_ready.set()

    @property
    def log(self) -> str:
        return "".join(self._lines)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 120) -> Answer:
        """One request on a connection of its own. A body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, None, {name.replace("_", "-"): value for name, value in headers.items()})

    def raw(self, data: bytes, *, half_close: bool = False, timeout: float = 30) -> bytes:
        """All that comes back for some bytes, whatever they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            pieces = []
            with suppress(ConnectionResetError):
                while piece := connection.recv(65536):
                    pieces.append(piece)
        return b"".join(pieces)

    def resident_bytes(self) -> int:
        """Memory that the process takes, on Linux."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the process has no memory")

    def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Its exit code after a signal."""
        self._process.send_signal(number)
        code = self._process.wait(seconds)
        self._reader.join(5)
        return code

    def kill(self) -> None:
        if self.running:
            self._process.kill()
        self._process.wait()
        self._reader.join(5)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        self.kill()


class Answer:
    """An answer over HTTP."""

    def __init__(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.status, self.headers, self.data = status, headers, data

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> dict[str, Any]:
        """What went wrong, in OpenAI's format."""
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found

    @property
    def events(self) -> list[Any]:
        """The objects of a stream, without its last line, which has to be there."""
        lines = [line.removeprefix("data: ") for line in self.data.decode().splitlines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]


def until(condition: Any, seconds: float = 20) -> bool:
    """Whether something comes true in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())
