"""A Ray cluster of one machine for a test: real processes, in a directory of their own, and gone with the block."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

_SECONDS = 180.0  # for a start on a busy machine
_STORE_BYTES = 80_000_000  # the least that Ray takes, and more than lines need


class LocalRay:
    """A head with so many CPUs, as `ray start --head` makes it.

    address: of it
    """

    def __init__(self, n_cpus: int = 2) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # its sockets have names of at most 107 bytes
        self.directory = Path(tempfile.mkdtemp(prefix="kvr"))
        self.address = f"127.0.0.1:{port}"
        arguments = [
            "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", f"--num-cpus={n_cpus}", "--num-gpus=0",
            f"--object-store-memory={_STORE_BYTES}", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={self.directory}",
        ]  # fmt: skip
        self._log = (self.directory / "start.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *arguments],
            stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"RAY_raylet_start_wait_time_s": str(int(_SECONDS))},
        )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + _SECONDS
        while "Ray runtime started" not in (told := (self.directory / "start.log").read_text()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(told)
            time.sleep(0.1)

    def processes(self, name: str) -> list[int]:
        """Of this cluster, those whose command line has the name: gcs_server, raylet, or a class of actors."""
        ours = {pid: command for pid, command in _commands().items() if str(self.directory) in command}
        raylets = {pid for pid, command in ours.items() if "raylet/raylet" in command}
        workers = {pid: command for pid, command in _commands().items() if _parent(pid) in raylets}
        return [pid for pid, command in (ours | workers).items() if name in command]

    def workers(self) -> list[int]:
        """The processes of actors that answer lines of a batch."""
        return self.processes("ray::BatchWorker")

    def kill(self, name: str) -> int:
        """SIGKILL for all of a name; returns how many there were."""
        return sum(_kill(pid) for pid in self.processes(name))

    def close(self) -> None:
        """Ends everything, also what hangs."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        deadline = time.monotonic() + 30
        while (left := self.processes("")) and time.monotonic() < deadline:
            for pid in left:
                _kill(pid)
            time.sleep(0.1)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _commands() -> dict[int, str]:
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with suppress(OSError):
                found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def _parent(pid: int) -> int:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _kill(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False
