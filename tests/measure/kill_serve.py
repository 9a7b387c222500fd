"""Kills a server at random moments while clients stream answers from it, and starts it again; then nothing that was delivered is missing.

    python tests/measure/kill_serve.py 200
    python tests/measure/kill_serve.py 20 --model smollm2-135m

Several clients lead conversations and send the whole history each time, as such programs do. After each kill it is looked at what the disk has: each
answer that came to its end is in a conversation as it was delivered, and so is what was delivered of one that was broken off. A client whose answer
was broken off then asks again, or sends what it has got and goes on. The first answer of a client after a start must have read again only what came
after the newest snapshot that the disk has of the conversation. How long a start takes is told, too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from serving_process import ServerProcess, until
from shallow_model import write_shallow_model

from kvlocal.conversations.records import TranscriptError
from kvlocal.conversations.snapshot import snapshot_path
from kvlocal.conversations.transcript import Transcript
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.template.markup import Message

OPTIONS = ("--temp", "0", "--max-tokens", "24", "--kv-budget", "256", "--stride", "64", "--threads", "1", "--archive-ram", "200", "--parallel", "2")
N_MESSAGES = 16  # after which a client begins a new conversation
TEXTS = (
    "Name a bird that lives near the sea.",
    "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. What did the keeper write down?",
    "Count from one to ten.",
    "I live in a lighthouse with two cats and a dog. What would you ask me?",
    "Write a sentence about the weather, the ships and the birds that the keeper of the lighthouse saw on a rainy day in November.",
)


@dataclass
class Kept:
    """A conversation as the disk has it.

    lengths: numbers of messages that its snapshot can bring back, the largest first
    """

    messages: list[Message]
    lengths: list[int] = field(default_factory=list)

    def n_common(self, messages: list[Message]) -> int:
        pairs = zip(self.messages, messages, strict=False)
        return next((i for i, (one, other) in enumerate(pairs) if not same(one, other)), min(len(self.messages), len(messages)))

    def n_ready(self, messages: list[Message]) -> int:
        """How many of these messages its snapshot spares."""
        n = self.n_common(messages)
        return next((length for length in self.lengths if length <= n), 0)

    def begins_with(self, messages: list[Message], answer: str) -> bool:
        """Whether it has these messages, and then an answer that begins like this."""
        return len(self.messages) > len(messages) == self.n_common(messages) and self.messages[len(messages)]["content"].startswith(answer)


def same(one: Message, other: Message) -> bool:
    return one["role"] == other["role"] and one["content"].strip() == other["content"].strip()


def on_disk(directory: Path) -> list[Kept]:
    """All conversations that are there."""
    found = []
    for path in directory.glob("served/*/*.jsonl"):
        try:
            kept = Kept(Transcript.read(path).messages)
        except TranscriptError:
            # begun, and no word in it
            assert path.read_bytes().count(b"\n") == 0, path
            continue
        snapshot = snapshot_path(path)
        if snapshot.exists():
            with snapshot.open("rb") as file:
                kept.lengths = [n for n, _ in json.loads(file.readline())["conversations"]]
        found.append(kept)
    return found


class Client:
    """Somebody who chats.

    messages: what was said, as the client has it
    n_whole: up to which of these it is as it came, and not broken off since then
    asked: the text whose answer it waits for
    delivered: what it has got of that
    tokens: by numbers of messages, the tokens that a conversation had with them
    """

    def __init__(self, number: int, rng: random.Random) -> None:
        self._number, self._rng, self._n_begun = number, rng, 0
        self.counts, self.problems = Counter[str](), list[str]()
        self._begin()

    def _begin(self) -> None:
        self._n_begun += 1
        self.messages: list[Message] = [{"role": "system", "content": "Be brief."}]
        self.n_whole = len(self.messages)
        self.asked: str | None = None
        self.delivered = ""
        self.tokens: dict[int, int] = {}

    def chat(self, server: ServerProcess, kept: list[Kept]) -> None:
        """Until the server is no more."""
        first = True
        try:
            while True:
                self._turn(server, kept if first else None)
                first = False
        except (OSError, http.client.HTTPException, EOFError):
            return

    def _turn(self, server: ServerProcess, kept: list[Kept] | None) -> None:
        if self.asked is None:
            if len(self.messages) > N_MESSAGES:
                self._begin()
            self.asked = f"{self._number}.{self._n_begun}.{len(self.messages)}: {self._rng.choice(TEXTS)}"
        messages = [*self.messages, {"role": "user", "content": self.asked}]
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        try:
            body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
            connection.request("POST", "/v1/chat/completions", json.dumps(body).encode())
            response = connection.getresponse()
            if response.status != 200:
                self.problems.append(f"status {response.status}: {response.read()!r}")
                time.sleep(0.5)
                return
            usage, over = None, False
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    self.delivered += choice["delta"].get("content") or ""
                    self.counts["pieces"] += 1
                    over = over or choice["finish_reason"] is not None
            if not over:
                raise EOFError
        finally:
            connection.close()
        self.messages = [*messages, {"role": "assistant", "content": self.delivered}]
        self.asked, self.delivered, self.n_whole = None, "", len(self.messages)
        self.counts["answers"] += 1
        if usage is not None:
            self.tokens[len(self.messages)] = usage["total_tokens"]
            if kept is not None:
                self._check_cached(messages, kept, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])

    def _check_cached(self, messages: list[Message], kept: list[Kept], prompt: int, cached: int) -> None:
        """The first answer after a start."""
        ready = max((each.n_ready(messages[1:]) for each in kept), default=0)
        expected = self.tokens.get(ready + 1, 0)
        self.counts["first turns"] += 1
        self.counts["first turns with a snapshot"] += ready > 0
        self.counts["prompt tokens of first turns"] += prompt
        self.counts["tokens that first turns read"] += prompt - cached
        if cached < expected:
            self.problems.append(f"{cached} of {prompt} tokens were cached, and a snapshot had {expected}: {messages[-1]}")

    def check_kept(self, kept: list[Kept]) -> None:
        """What was delivered is on the disk."""
        said = self.messages[1 : self.n_whole]
        if said and not any(each.n_common(said) == len(said) for each in kept):
            self.problems.append(f"not in a conversation: {said[-1]}")
        if self.delivered:
            asked = [*self.messages[1:], {"role": "user", "content": self.asked or ""}]
            if not any(each.begins_with(asked, self.delivered) for each in kept):
                self.problems.append(f"not in a conversation: {self.delivered!r}, after {self.asked!r}")

    def decide(self) -> None:
        """After an answer that was broken off: it asks again, or goes on with what it has."""
        if self.asked is None:
            return
        self.counts["broken off before" if not self.delivered else "broken off in answers"] += 1
        if self.delivered and self._rng.random() < 0.5:
            self.messages += [{"role": "user", "content": self.asked}, {"role": "assistant", "content": self.delivered}]
            self.asked = None
        self.delivered = ""


def kill_once(model: Path, directory: Path, clients: list[Client], n_pieces: int, archive: str, starts: list[float]) -> int:
    """Starts a server, kills it when the clients have got so many pieces of answers, and returns how many conversations there are then.

    starts: gets how long the start took
    """
    kept = on_disk(directory)
    started = time.perf_counter()
    with ServerProcess(model, *OPTIONS, "--archive", archive, "--archive-dir", str(directory)) as server:
        starts.append(time.perf_counter() - started)
        threads = [threading.Thread(target=client.chat, args=(server, kept)) for client in clients]
        for thread in threads:
            thread.start()
        wanted = n_pieces + sum(client.counts["pieces"] for client in clients)
        until(lambda: sum(client.counts["pieces"] for client in clients) >= wanted, 60)
        by_itself = not server.running
        server.kill()
        if by_itself or "Traceback" in server.log:
            clients[0].problems.append(server.log)
    for thread in threads:
        thread.join()
    kept = on_disk(directory)
    for client in clients:
        client.check_kept(kept)
        client.decide()
    return len(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--model", help="whole; by default three layers of the smallest one")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pieces", type=int, default=150, help="of answers that clients get before a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--archive", choices=["ram", "disk"], default="ram")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    clients = [Client(i, random.Random(rng.random())) for i in range(args.clients)]
    starts, n_kept, n_kills = list[float](), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        model = directory / "model.gguf"
        if args.model:
            model = resolve(args.model)
        else:
            write_shallow_model(resolve(DEFAULT_MODEL), model, 3, quantized=True)
        with suppress(KeyboardInterrupt):  # then it tells how far it came
            while n_kills < args.kills:
                n_kept = kill_once(model, directory, clients, rng.randrange(args.pieces), args.archive, starts)
                n_kills += 1
                n_problems = sum(len(client.problems) for client in clients)
                print(f"kill {n_kills}/{args.kills}: {n_kept} conversations, {n_problems} problems", file=sys.stderr, flush=True)
    problems = [problem for client in clients for problem in client.problems]
    counts = sum((client.counts for client in clients), Counter())
    start = {"median": round(statistics.median(starts), 2), "longest": round(max(starts), 2)}
    print(json.dumps({"kills": n_kills, **counts, "conversations": n_kept, "seconds to start": start, "problems": problems}, indent=1))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
