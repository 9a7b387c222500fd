"""Feeds a running server requests that nobody would send: `python tests/measure/fuzz_server.py 10000`.

Bodies are mutated and nested, fields have values of other kinds, headers are broken, senders are slow, and connections are closed halfway.
After each request the server has to be there; what comes back is an HTTP answer or nothing, never a traceback, and never what another key
has said. Memory is looked at --samples times, each time after all conversations that were begun meanwhile are deleted, as those that are kept take
their place in it. What it does in the second half, where whatever is made once has been made, is a line through its samples.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from serving_process import OPTIONS, ServerProcess, until
from shallow_model import write_shallow_model

from kvlocal.hub.catalogue import resolve

SECRET = "zanzibar-7431"  # of the other key
# glibc gives back what is freed at once: otherwise it is not told from what leaks
PROMPT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
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


def memory_without_conversations(server: ServerProcess, key: str) -> int:
    """What the server takes when it keeps no conversation of this key, in bytes."""
    for each in server.get("/conversations", Authorization=f"Bearer {key}").json["data"]:
        # one whose client has gone may be answered a little longer
        assert until(lambda path=f"/conversations/{each['id']}": server.request(
            "DELETE", path, headers={"Authorization": f"Bearer {key}"}).status in (200, 404)), each  # fmt: skip
    return server.resident_bytes()


def growth(samples: list[tuple[int, int]]) -> tuple[float, float]:
    """How fast memory grows over samples (requests so far, bytes), in bytes a request, and the standard error of that."""
    x, y = np.array(samples, float).T
    x -= x.mean()
    slope = (x @ y) / (x @ x)
    rest = y - y.mean() - slope * x
    return float(slope), float(np.sqrt((rest @ rest) / (len(x) - 2) / (x @ x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=40, help="of the memory")
    args = parser.parse_args()
    n, rng, statuses = args.requests, random.Random(args.seed), Counter[str]()
    samples: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model.gguf"
        write_shallow_model(resolve("smollm2-135m"), model, 3, quantized=True)
        with ServerProcess(model, *OPTIONS, "--forget", environment={"KVLOCAL_API_KEY": "good-key other-key", **PROMPT_MALLOC}) as server:
            secret = {"messages": [{"role": "user", "content": f"The secret is {SECRET}. " * 5}]}
            assert server.post("/v1/chat/completions", secret, Authorization="Bearer other-key").status == 200
            for i in range(1, n + 1):
                answer = send(server, rng, "good-key")
                assert server.running, f"request {i} of seed {args.seed} ended the server: {server.log}"
                assert not answer or answer.startswith(b"HTTP/1.1 "), (i, answer[:200])
                assert b"Traceback" not in answer and SECRET.encode() not in answer, (i, answer)
                statuses[answer[9:12].decode() or "closed"] += 1
                if i % max(1, n // args.samples) == 0:
                    samples.append((i, memory_without_conversations(server, "good-key")))
                    print(f"{i}/{n}: {samples[-1][1] / 1e6:.1f} MB", file=sys.stderr, flush=True)
            assert server.post("/v1/chat/completions", secret, Authorization="Bearer other-key").status == 200
            log = server.log
    assert "Traceback" not in log, log[-4000:]
    print(f"{n} requests: " + ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items())))
    half = samples[len(samples) // 2 :]
    slope, error = growth(half)
    print(f"memory without conversations: {samples[0][1] / 1e6:.1f} MB after {samples[0][0]} requests, {half[0][1] / 1e6:.1f} MB after {half[0][0]}, "
          f"{half[-1][1] / 1e6:.1f} MB at the end; in the second half {slope:.0f} +- {error:.0f} bytes a request")  # fmt: skip


if __name__ == "__main__":
    main()
