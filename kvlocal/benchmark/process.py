"""A worker as the benchmark sees it: started, told what to do, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any, Self

from kvlocal.errors import KvlocalError

# Threads of a worker that waits must sleep, not spin beside the one that computes.
_SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class BenchmarkError(KvlocalError):
    """A measurement cannot be made."""


class Worker:
    """A process with one llama.cpp, for a `with` block. Its methods' names and arguments are those of kvlocal.benchmark.worker.Host.

    name: for messages
    host: the arguments of Host
    """

    def __init__(self, name: str, **host: Any):
        self.name = name
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvlocal.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env={name: value for name, value in os.environ.items() if name not in _SPINNING},
            text=True,
            encoding="utf-8",
            # Ctrl-C is for us alone
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._commands, self._replies = self._process.stdin, self._process.stdout
        try:
            self._ask(host)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, do: str, **arguments: Any) -> Any:
        """Calls a method and waits for what it returns.

        Raises:
            BenchmarkError: the worker could not do it, or died.
        """
        return self._ask({"do": do, **arguments})

    def _ask(self, command: dict[str, Any]) -> Any:
        try:
            self._commands.write(json.dumps(command) + "\n")
            self._commands.flush()
            line = self._replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchmarkError(self._obituary())
        reply = json.loads(line)
        if "error" in reply:
            raise BenchmarkError(reply["error"])
        return reply["result"]

    def _obituary(self) -> str:
        code = self._process.wait()
        self._messages.seek(0)
        said = self._messages.read().decode("utf-8", "replace").strip().splitlines()
        why = f" ({said[-1].strip().rstrip('.')})" if said else ""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"the process with {self.name} {how}{why}: see whether the machine has enough memory, or try a smaller history"

    def close(self) -> None:
        """Ends the process at once. Closing twice is harmless."""
        self._process.kill()
        self._process.wait()
        self._replies.close()
        self._messages.close()
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
