"""Clients that chat in turns, come and go: `kvlocal serve` against llama.cpp's own server, built from the same source, and against that of
llama-cpp-python.

    make stock-server && python tests/measure/serve_against_llama_server.py --llama-server build/stock-server/bin/llama-server
    python tests/measure/serve_against_llama_server.py --llama-server ... --clients 4 --away 1 --tokens 800       # a small one

Each client sends its whole history with each turn, as such programs do, until the conversation has --tokens tokens. All but --away of them chat at
the same time; after --stay turns a client leaves its place to the one that has been away longest. Answers are greedy and have the same length
everywhere, as the tokens that end answers are forbidden. All servers have the same model, slots and threads; the ways take turns, --repeat times.
For llama.cpp's own servers each slot has a context for a whole conversation.

Told are: answer tokens a second, of all clients together from the first request to the last answer; seconds to the first token of later turns, not
of the first of a conversation, median and 90th percentile; tokens that were read, as the servers count them; and bytes of the KV cache on the
device.

--python-server wants a Python where `pip install 'llama-cpp-python[server]'` was done. Or, without compiling it again: `make stock stock-server`,
a Python with the extra's packages, and in the environment PYTHONPATH=build/stock-server/llama_cpp_python-VERSION and
LLAMA_CPP_LIB_PATH=build/stock/dist/lib. That server has one slot.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from kvlocal.benchmark.comparison import of_pairs
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model

OURS, LLAMA_SERVER, PYTHON_SERVER = "kvlocal serve", "llama-server", "llama_cpp.server"
THINGS = ("the weather", "the ships", "the birds", "the tides", "the lamp", "the boats of the village", "the storms", "the letters from home")
_MARGIN = 256  # cells of a stock slot beyond the conversation
_MARKUP = 10  # tokens around a text and its answer, about
_START_SECONDS = 120


class Server:
    """A server as a process, until the block ends.

    way: which one
    command: `{port}` in it is the port
    """

    def __init__(self, way: str, command: list[str], environment: dict[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.way = way
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [part.replace("{port}", str(self.port)) for part in command], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        end = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                log = self.log
                self.__exit__()
                raise SystemExit(f"{way} did not start: {log[-2000:]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return self.get("/v1/models")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@dataclass
class Client:
    """One that chats.

    messages: what was said
    n_tokens: of all that, counted here, so that it is the same for every server
    """

    number: int
    messages: list[dict[str, str]] = field(default_factory=list)
    n_tokens: int = 0

    def next_text(self, n_words: int) -> str:
        """The same for every server."""
        turn = len(self.messages) // 2
        words = f"Client {self.number}, turn {turn}: tell me more about {THINGS[(self.number + turn) % len(THINGS)]}."
        filler = f" On day {turn} of the journal of keeper {self.number} there was a word about {THINGS[(3 * turn + self.number) % len(THINGS)]}."
        return words + filler * max(0, (n_words - len(words.split())) // len(filler.split()))


@dataclass
class Turn:
    """What a turn took.

    later: it is not the first of its conversation
    first_token: seconds until it came
    n_read, n_answer: tokens; n_read is None if the server does not say it
    """

    later: bool
    first_token: float
    n_read: int | None
    n_answer: int


@dataclass
class Run:
    """All turns of all clients with one server.

    seconds: from the first request to the last answer
    kv_bytes: of the caches on the device, None if the server does not say it
    """

    turns: list[Turn]
    seconds: float
    kv_bytes: int | None

    @property
    def speed(self) -> float:
        return sum(turn.n_answer for turn in self.turns) / self.seconds

    @property
    def later(self) -> list[float]:
        return [turn.first_token for turn in self.turns if turn.later]


def turn(server: Server, client: Client, args: argparse.Namespace, model: Model) -> Turn:
    """Asks once, and notes what came."""
    asked = client.next_text(args.words)
    messages = [*client.messages, {"role": "user", "content": asked}]
    bias = {str(token): -100.0 for token in sorted(model.end_tokens)}
    body: dict[str, Any] = {
        "model": "any", "messages": messages, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0,
        "max_tokens": args.answer, "logit_bias": bias,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=3600)
    started, first, text, usage, n_pieces = time.perf_counter(), None, "", None, 0
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{server.way} answered with {response.status}: {response.read()[:500]!r}")
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise SystemExit(f"{server.way} failed: {chunk}")
            usage = chunk.get("usage") or usage
            piece = "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", ()))
            if piece and first is None:
                first = time.perf_counter() - started
            text, n_pieces = text + piece, n_pieces + bool(piece)
    finally:
        connection.close()
    later = bool(client.messages)
    client.messages = [*messages, {"role": "assistant", "content": text}]
    client.n_tokens += len(model.tokenize(asked, parse_special=False)) + args.answer + _MARKUP
    if usage is None:
        # llama-cpp-python's does not count in streams; a piece is a token, all but some characters that take several
        return Turn(later, first or 0.0, None, n_pieces)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Turn(later, first or 0.0, None if cached is None else usage["prompt_tokens"] - cached, usage["completion_tokens"])


def run(server: Server, args: argparse.Namespace, model: Model) -> Run:
    """All clients with one server, to the end."""
    away, lock = deque(Client(i) for i in range(args.clients)), threading.Lock()
    turns, failures = list[Turn](), list[BaseException]()

    def place() -> None:
        """One of the places where somebody chats."""
        try:
            while not failures:
                with lock:
                    if not away:
                        return
                    client = away.popleft()
                for _ in range(args.stay):
                    if client.n_tokens < args.tokens:
                        turns.append(turn(server, client, args, model))
                if client.n_tokens < args.tokens:
                    with lock:
                        away.append(client)
        except BaseException as error:  # noqa: BLE001 - told in the thread that waits
            failures.append(error)

    threads = [threading.Thread(target=place) for _ in range(args.clients - args.away)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if failures:
        raise failures[0]
    return Run(turns, seconds, kv_bytes(server))


def kv_bytes(server: Server) -> int | None:
    """Of the caches on the device: kvlocal tells it, and llama.cpp writes it to its log."""
    if server.way == OURS:
        return int(json.loads(server.get("/props")[1])["kv_bytes"])
    sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", server.log)
    return int(sum(float(size) for size in sizes) * 2**20) or None


def servers(args: argparse.Namespace, model: Path, directory: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The commands of all ways, and what they have in their environment."""
    slot = -(-(args.tokens + args.answer + 4 * args.words + _MARGIN) // 256) * 256
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    found = {
        OURS: (
            [sys.executable, "-m", "kvlocal_cli", "serve", str(model), "--port", "{port}", "--parallel", str(args.slots),
             "--threads", str(args.threads), "--waiting", str(args.clients), "--archive-dir", str(directory), *args.serve_options.split()],
            threads,
        )
    }  # fmt: skip
    if args.llama_server:
        found[LLAMA_SERVER] = (
            [args.llama_server, "-m", str(model), "--host", "127.0.0.1", "--port", "{port}", "-np", str(args.slots), "-c", str(args.slots * slot),
             # so much is logged that the size of its caches is
             "-t", str(args.threads), "-tb", str(args.threads), "-lv", "4", *args.llama_server_options.split()],
            threads,
        )  # fmt: skip
    if args.python_server:
        found[PYTHON_SERVER] = (
            [args.python_server, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1", "--port", "{port}", "--n_ctx", str(slot),
             "--n_threads", str(args.threads), "--n_threads_batch", str(args.threads), "--interrupt_requests", "false", "--verbose", "true"],
            threads,
        )  # fmt: skip
    return found


def described(runs: list[Run]) -> dict[str, Any]:
    """The medians of a way's runs."""
    later = [second for each in runs for second in each.later]
    read = [each.n_read for each in runs[-1].turns]
    return {
        "answer tokens a second": round(statistics.median(each.speed for each in runs), 2),
        "seconds to the first token of a later turn": {
            "median": round(statistics.median(later), 3), "90th percentile": round(float(np.percentile(later, 90)), 3)
        } if later else None,
        "turns": len(runs[-1].turns),
        "answer tokens": sum(each.n_answer for each in runs[-1].turns),
        "tokens read": None if None in read else sum(n or 0 for n in read),
        "KV cache, MB": None if runs[-1].kv_bytes is None else round(runs[-1].kv_bytes / 1e6, 1),
        "seconds": [round(each.seconds, 1) for each in runs],
    }  # fmt: skip


def compared(ours: list[Run], other: list[Run]) -> dict[str, Any]:
    """Ratios of ours to another way, with 95 % intervals over the repetitions."""
    rows = {
        "answer tokens a second": of_pairs("", [each.speed for each in ours], [each.speed for each in other], ""),
        "seconds to the first token of a later turn": of_pairs(
            "", [statistics.median(each.later) for each in ours], [statistics.median(each.later) for each in other], ""
        ),
    }
    found: dict[str, Any] = {name: [round(value, 3) for value in (row.ratio, row.lo, row.hi)] for name, row in rows.items()}
    if ours[-1].kv_bytes and other[-1].kv_bytes:
        found["KV cache"] = round(ours[-1].kv_bytes / other[-1].kv_bytes, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", help="the binary that `make stock-server` builds")
    parser.add_argument("--python-server", help="a Python that has llama_cpp.server")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--away", type=int, default=3, help="of these, at any time")
    parser.add_argument("--stay", type=int, default=2, help="turns that a client stays for")
    parser.add_argument("--tokens", type=int, default=4000, help="of each conversation")
    parser.add_argument("--words", type=int, default=60, help="of each text of a client, about")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--serve-options", default="--kv-budget 512", help="more of kvlocal serve")
    parser.add_argument("--llama-server-options", default="", help="more of llama-server")
    args = parser.parse_args()
    if not 0 <= args.away < args.clients:
        parser.error("--away has to be less than --clients")
    path = resolve(args.model)
    runs: dict[str, list[Run]] = {}
    with Model(path) as model:
        for i in range(args.repeat):
            with tempfile.TemporaryDirectory() as directory:
                ways = list(servers(args, path, Path(directory)).items())
                for way, (command, environment) in ways[:: -1 if i % 2 else 1]:
                    with Server(way, command, environment) as server:
                        runs.setdefault(way, []).append(run(server, args, model))
                    last = runs[way][-1]
                    print(f"{i + 1}/{args.repeat} {way}: {last.speed:.1f} answer tokens a second, {len(last.turns)} turns in {last.seconds:.0f} s",
                          file=sys.stderr, flush=True)  # fmt: skip
    report = {way: described(each) for way, each in runs.items()}
    ratios = {f"{OURS} to {way}": compared(runs[OURS], runs[way]) for way in runs if way != OURS}
    print(json.dumps({"settings": {name: value for name, value in vars(args).items() if "server" not in name}, **report, **ratios}, indent=1))


if __name__ == "__main__":
    main()
