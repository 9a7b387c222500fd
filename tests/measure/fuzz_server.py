"""Feeds a running server requests that nobody would send: `python tests/measure/fuzz_server.py 10000`.

Bodies are mutated and nested, fields have values of other kinds, headers are broken, senders are slow, and connections are closed halfway.
After each request the server has to be there; what comes back is an HTTP answer or nothing, never a traceback, and never what another key
has said. At the end its memory is compared with what it took after the first tenth: conversations that were begun meanwhile are kept,
so it grows with them.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from serving_process import OPTIONS, ServerProcess
from shallow_model import write_shallow_model

from kvlocal.hub.catalogue import resolve

SECRET = "zanzibar-7431"  # of the other key
POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses", "/tokenize", "/detokenize")
PATHS = (*POSTED, "/conversations/x", "/v1/models", "/metrics", "/nothing")
SOUND: dict[str, Any] = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}], "input": "Hello", "content": "Hello",
    "tokens": [1, 2, 3], "max_tokens": 2, "max_output_tokens": 2, "stream": False, "stop": ["x"], "seed": 1, "temperature": 0.5, "top_p": 0.9,
    "top_k": 3, "min_p": 0.1, "n": 1, "tools": [{"type": "function", "function": {"name": "f"}}], "response_format": {"type": "json_object"},
    "logit_bias": {"1": 2}, "stream_options": {"include_usage": True}, "tool_choice": "auto", "previous_response_id": None, "system": "x",
    "prompt": ["Hello", "World"], "echo": True, "logprobs": 2, "best_of": 1, "suffix": "", "encoding_format": "base64", "dimensions": 8,
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 2**70, 1e308, -0.0, "", "x" * 5000, "\x00", "\u202e", "😀" * 100, [], {}, [[]], {"type": "text"}, ["a", None],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "tool", "content": "x", "tool_call_id": 5}], [None] * 50, {"": {"": {}}},
)  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """A body: sound, with odd values, nested, or with broken bytes."""
    body = {name: SOUND[name] for name in rng.sample(list(SOUND), rng.randrange(len(SOUND)))}
    if rng.random() < 0.7:
        body |= {name: SOUND[name] for name in ("messages", "input", "prompt", "content", "tokens", "max_tokens", "max_output_tokens")}
    for name in rng.sample(list(SOUND), rng.randrange(3)):
        body[name] = rng.choice(ODD)
    data = json.dumps(body).encode()
    match rng.randrange(8):
        case 0:
            position = rng.randrange(len(data))
            return data[:position] + rng.randbytes(rng.randrange(1, 5)) + data[position + rng.randrange(3) :]
        case 1:
            return data[: rng.randrange(len(data))]
        case 2:
            depth = rng.choice((10, 190, 210, 5000, 200_000))
            return b'{"messages":' + rng.choice((b"[", b'{"a":')) * depth
        case 3:
            return data.replace(b"1", b"1e999").replace(b"2", b"NaN")
        case _:
            return data


def header(rng: random.Random, size: int, key: str) -> bytes:
    """The header of a request, mostly sound."""
    method, path = ("POST", rng.choice(POSTED)) if rng.random() < 0.8 else (rng.choice(("POST", "GET", "DELETE", "BREW")), rng.choice(PATHS))
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    length = size if rng.random() < 0.9 else rng.choice((0, size + 5, max(0, size - 5), -1, 10**15, "x"))
    lines.append(f"Content-Length: {length}")
    wrong = ("Authorization: Bearer wrong", "Authorization: \xff", "x-api-key: \xe9", "X: y")
    lines.append(rng.choice((f"Authorization: Bearer {key}", f"x-api-key: {key}") if rng.random() < 0.8 else wrong))
    if rng.random() < 0.1:
        lines.append(rng.choice(("Transfer-Encoding: chunked", "Expect: 100-continue", "A" * 40_000, "B: " + "b" * 40_000, "Origin: https://x.y",
                                 "Upgrade: websocket", "Connection: upgrade", ": none", "Content-Encoding: gzip")))  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def send(server: ServerProcess, rng: random.Random, key: str) -> bytes:
    """Sends one request, whole or not, and returns what comes back."""
    body = mutated(rng)
    data = header(rng, len(body), key) + body
    if rng.random() < 0.05:
        data = rng.randbytes(rng.randrange(200))
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.5) as connection:
        way = rng.random()
        pieces: list[bytes] = []
        try:
            if way < 0.05:  # gone before it is all there
                connection.sendall(data[: rng.randrange(len(data) + 1)])
                return b""
            if way < 0.1:
                connection.sendall(data[: len(data) // 2])
                time.sleep(0.05)
                connection.sendall(data[len(data) // 2 :])
            else:
                connection.sendall(data)
            if way > 0.9:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                pieces.append(piece)
                if way > 0.85 and way < 0.9:  # gone in the middle of the answer
                    break
                if b"\r\n\r\n" in (answer := b"".join(pieces)) and is_whole(answer):
                    break
        except (TimeoutError, ConnectionError):
            pass
        return b"".join(pieces)


def is_whole(answer: bytes) -> bool:
    """Whether an answer with a length has come to its end."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return (bool(lengths) and len(body) >= lengths[0]) or body.endswith(b"0\r\n\r\n")


def main() -> None:
    n, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    rng, statuses, early = random.Random(seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model.gguf"
        write_shallow_model(resolve("smollm2-135m"), model, 3, quantized=True)
        with ServerProcess(model, *OPTIONS, "--forget", environment={"KVLOCAL_API_KEY": "good-key other-key"}) as server:
            secret = {"messages": [{"role": "user", "content": f"The secret is {SECRET}. " * 5}]}
            assert server.post("/v1/chat/completions", secret, Authorization="Bearer other-key").status == 200
            for i in range(n):
                answer = send(server, rng, "good-key")
                assert server.running, f"request {i} of seed {seed} ended the server: {server.log}"
                assert not answer or answer.startswith(b"HTTP/1.1 "), (i, answer[:200])
                assert b"Traceback" not in answer and SECRET.encode() not in answer, (i, answer)
                statuses[answer[9:12].decode() or "closed"] += 1
                if i == n // 10:
                    early = server.resident_bytes()
                if sys.stderr.isatty() or i % 500 == 0:
                    print(f"\r{i}/{n}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
            assert server.post("/v1/chat/completions", secret, Authorization="Bearer other-key").status == 200
            late, log = server.resident_bytes(), server.log
    assert "Traceback" not in log, log[-4000:]
    print(f"{n} requests: " + ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items())))
    print(f"memory after a tenth {early / 1e6:.0f} MB, at the end {late / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
