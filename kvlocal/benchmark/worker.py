"""A process that loads one llama.cpp, ours or stock, and obeys commands: a JSON object a line in, one a line out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvlocal import policies
from kvlocal.benchmark.readers import Figures, PlainReader, Reader, SessionReader
from kvlocal.benchmark.script import Script
from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.llama.library import load, load_stock
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement
from kvlocal.nexus.discovery import nexus_for


class Host:
    """The model, the script and the readers of one process. Its public methods are the commands.

    stock: directory of the stock library; None for ours
    model: the GGUF file
    n_answer: of the script
    placement: the fields of a Placement, by their names; by default all layers go to a GPU
    nexus: of the sessions whose policy needs Nexus tokens, as in kvlocal.nexus.discovery
    """

    def __init__(self, stock: str | None, model: str, n_answer: int, placement: Mapping[str, Any] | None = None, nexus: str | None = None):
        self._library = load_stock(stock) if stock else load()
        given = placement or {"n_gpu_layers": ALL}
        # as lists, if they come as JSON
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        self._model = Model(model, placement=Placement(**fields))
        self._script = Script(self._model, n_answer)
        self._readers: dict[str, Reader] = {}
        self._nexus = nexus

    def version(self) -> dict[str, str]:
        return {"llama_cpp": self._library.bindings_version, "patches": self._library.patch_level, "model": self._model.description}

    def n_tokens(self, n_turns: int) -> int:
        return self._script.n_tokens(n_turns)

    def open_session(self, reader: str, config: dict[str, Any]) -> None:
        made = SessionConfig(**config)
        wanted = "nexus" in policies.make(made.policy, made.policy_args).needs
        nexus = nexus_for(self._model, self._nexus, warn=_warn) if wanted else None
        self._readers[reader] = SessionReader(self._model, self._script, made, nexus)

    def open_plain(self, reader: str, context: dict[str, Any], shift: bool = False, window: int = 0) -> None:
        self._readers[reader] = PlainReader(self._model, self._script, context, shift, window)

    def extend(self, reader: str, history: int, at_most: int) -> int:
        return self._readers[reader].extend(history, at_most)

    def slice(self, reader: str, n: int, at_once: int) -> float:
        return self._readers[reader].slice(n, at_once)

    def read_text(self, reader: str, n: int) -> float:
        return self._readers[reader].read_text(n)

    def turn(self, reader: str) -> Figures:
        return self._readers[reader].turn()

    def figures(self, reader: str) -> Figures:
        return self._readers[reader].figures()

    def close(self, reader: str) -> None:
        self._readers.pop(reader).close()

    def peak_rss(self) -> int:
        """The most memory this process ever had resident, in bytes."""
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _warn(message: str) -> None:
    sys.stderr.write(message + "\n")


def main() -> None:
    """The first line holds the arguments of Host, each later one {"do": method, ...its arguments}; the reply is {"result"} or {"error"}."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # whatever else is printed must not get between the replies
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # not by iterating over the file, which may read ahead
    commands = iter(sys.stdin.readline, "")
    host: Host | None = None
    for line in commands:
        arguments = json.loads(line)
        method: Callable[..., Any] = getattr(host, arguments.pop("do")) if host else Host
        try:
            result = method(**arguments)
            if host is None:
                host, result = result, None
            reply = {"result": result}
        except KvlocalError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
