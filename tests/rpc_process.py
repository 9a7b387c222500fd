"""`kvlocal rpc-server` in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from serving_process import until

from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context


@contextmanager
def ggml_attention() -> Iterator[None]:
    """Contexts that are made in the block have ggml's attention alone, as RPC servers have: it rounds otherwise than ours."""
    init = Context.__init__

    def without_ours(context: Context, *args: object, **options: object) -> None:
        init(context, *args, **options)
        NativeCache(context.pointer).enable_attention(False)

    Context.__init__ = without_ours
    try:
        yield
    finally:
        Context.__init__ = init


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class RpcServer:
    """One on a free port, until the block ends.

    port: another one than a free one
    """

    def __init__(self, port: int | None = None, threads: int = 1) -> None:
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvlocal_cli", "rpc-server", "--port", str(self.port), "--threads", str(threads)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        if not until(self._listens, 120):
            raise AssertionError(f"the server did not start: {self.end(signal.SIGKILL)}")

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
            return True
        return False

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def end(self, number: int = signal.SIGTERM) -> str:
        """What it has said, after a signal."""
        self._process.send_signal(number)
        return self._process.communicate(timeout=60)[1]

    @property
    def exit_code(self) -> int:
        return self._process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.end(signal.SIGKILL)
