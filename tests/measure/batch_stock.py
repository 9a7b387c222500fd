"""Throughput of long conversations by their number: a batch within a budget, against stock llama.cpp at full context.

    make stock && python tests/measure/batch_stock.py --stock build/stock/dist/lib --parallel 1,2,4,8

N conversations with the same history each are read and then answered with --generate tokens each, in three ways: as `kvlocal batch --parallel N`
does it, by stock llama.cpp in one context with N sequences that decode a token of each in one batch (as its llama-batched-bench does), and by N
processes with stock llama.cpp, which share the threads. Answers are greedy and do not end before. The ways take turns, as often as --repeat says.

Two speeds are told, both for all N conversations together: `generation`, the tokens of the answers by the seconds from the first of them on, and
`whole`, the tokens of history and answers by the seconds from the beginning. The ratios are those of the batch to each of the others in the same
turn, as medians.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np

from kvlocal.batch.run import run_batch
from kvlocal.benchmark.comparison import of_pairs
from kvlocal.benchmark.script import Script
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession, Message
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.context import Context
from kvlocal.llama.library import load, load_stock
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.template.chat_template import ChatTemplate

BATCH, PARALLEL, SEPARATE = "batch", "stock, one context", "stock, N processes"
SPEEDS = ("generation", "whole")


@dataclass(frozen=True)
class Turn:
    """What one way took for all conversations.

    n_read, n_generated: tokens of history and of answers, of all together
    generating, seconds: for the answers, and in all
    kv_bytes: allocated for the caches and, beside them, the recorded queries
    """

    n_read: int
    n_generated: int
    generating: float
    seconds: float
    kv_bytes: int

    @property
    def speeds(self) -> dict[str, float]:
        return {"generation": self.n_generated / self.generating, "whole": (self.n_read + self.n_generated) / self.seconds}


def together(turns: list[Turn]) -> Turn:
    """Of processes that began at the same time."""
    return Turn(
        sum(turn.n_read for turn in turns),
        sum(turn.n_generated for turn in turns),
        max(turn.generating for turn in turns),
        max(turn.seconds for turn in turns),
        sum(turn.kv_bytes for turn in turns),
    )


def summary(turns: dict[str, list[Turn]]) -> dict:
    """Of the turns of each way, [repeat]: the medians, and the batch in ratio to the others."""
    speeds = {speed: {way: [turn.speeds[speed] for turn in taken] for way, taken in turns.items()} for speed in SPEEDS}
    rows = {(speed, way): of_pairs(speed, speeds[speed][BATCH], speeds[speed][way], "tokens/s") for speed in SPEEDS for way in turns}
    return {
        way: {speed: round(rows[speed, way].other, 2) for speed in SPEEDS}
        | {f"batch_to_it_{speed}": round(rows[speed, way].ratio, 3) for speed in SPEEDS}
        | {"kv_bytes": taken[-1].kv_bytes, "n_read": taken[-1].n_read, "n_generated": taken[-1].n_generated}
        for way, taken in turns.items()
    }


def table(found: dict[int, dict]) -> str:
    """What `summary` gave for each number, as plain text."""
    lines = [f"{'N':>2}  {'':<20}{'generation':>12}{'whole':>10}{'KV cache':>12}   batch to it: generation, whole"]
    for number, ways in found.items():
        for way, row in ways.items():
            kv = f"{row['kv_bytes'] / 1e6:.1f} MB"
            ratios = f"{row['batch_to_it_generation']:.2f}, {row['batch_to_it_whole']:.2f}"
            lines.append(f"{number:>2}  {way:<20}{row['generation']:>12.1f}{row['whole']:>10.1f}{kv:>12}   {ratios}")
    return "\n".join(lines)


def conversation(model: Model, n_tokens: int) -> tuple[list[Message], np.ndarray]:
    """Turns of at least so many tokens, the last of them the user's, and their tokens with all markup, int32 [n]."""
    template, script = ChatTemplate.from_model(model), Script(model, n_answer=120)
    messages: list[Message] = []
    parts = [script.prefix]
    while True:
        turn = script.turn(len(messages) // 2)
        given = [("user", turn.text, template.user_turn), ("assistant", model.detokenize(turn.answer), template.given_assistant)]
        for role, text, pieces_of in given:
            parts += [tokens for _, tokens in template.tokens(model, pieces_of(messages[-2:], text))]
            messages.append({"role": role, "content": text})
            if role == "user" and sum(map(len, parts)) >= n_tokens:
                return messages, np.concatenate(parts)


class OursHost:
    """The batch in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        load()
        self._model, self._n = Model(args.model), args.n
        # answers are as long as those of the others
        ChatTemplate.from_model(self._model).end_tokens = frozenset()
        self._config = SessionConfig(
            budget=args.kv_budget, policy=args.policy, max_tokens=args.generate, sampling=SamplingParams(temperature=0), n_threads=args.threads
        )
        self._line = json.dumps({"messages": conversation(self._model, args.tokens)[0]}).encode()
        with ChatSession(self._model, self._config) as session:
            self._kv_bytes = session.cache.kv_bytes

    def turn(self) -> Turn:
        started = time.perf_counter()
        results = list(run_batch([self._line] * self._n, self._model, self._config, parallel=self._n))
        seconds = time.perf_counter() - started
        timings = [result.timings for result in results]
        return Turn(
            int(sum(timing["prompt_tokens"] for timing in timings)),
            int(sum(timing["answer_tokens"] for timing in timings)),
            max(timing["answer_seconds"] for timing in timings),
            seconds,
            self._n * self._kv_bytes,
        )


class StockHost:
    """Stock llama.cpp with a sequence for each conversation."""

    def __init__(self, args: argparse.Namespace) -> None:
        load_stock(args.stock)
        model = Model(args.model)
        self._tokens, self._n, self._n_generate = conversation(model, args.tokens)[1], args.n, args.generate
        n_cells = len(self._tokens) + args.generate
        self._context = Context(model, n_cells=n_cells, n_ubatch=args.ubatch, n_seq_max=args.n, n_outputs=args.n, n_threads=args.threads)

    def turn(self) -> Turn:
        context, n, n_read = self._context, self._n, len(self._tokens)
        context.clear()
        started = time.perf_counter()
        for seq in range(n):
            for start in range(0, n_read, context.n_ubatch):
                context.decode(self._tokens[start : start + context.n_ubatch], start, seq)
        drawn = np.full(n, context.logits().argmax())
        read = time.perf_counter()
        for pos in range(n_read, n_read + self._n_generate):
            context.decode_sequences(drawn, np.full(n, pos), np.arange(n))
            drawn = context.logits_all().argmax(axis=1)
        ended = time.perf_counter()
        return Turn(n * n_read, n * self._n_generate, ended - read, ended - started, context.kv_bytes())


class Child:
    """A process with a host, which takes a turn when it is told to; ends with its `with` block."""

    def __init__(self, args: argparse.Namespace, **changes: object) -> None:
        options = vars(args) | changes
        command = [sys.executable, __file__, "--child", json.dumps(options)]
        # stock llama.cpp tells there what it does
        messages = None if options["ours"] else subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True)

    def begin(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> Turn:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a process ended with code {self._process.wait()}")
        return Turn(**json.loads(line))

    def __enter__(self) -> Self:
        if not self._process.stdout.readline():
            sys.exit(f"a process ended with code {self._process.wait()} before it was ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def serve(args: argparse.Namespace) -> None:
    """A turn for each line of standard input."""
    replies = os.fdopen(os.dup(1), "w")
    # whatever else is printed must not get between the replies
    os.dup2(2, 1)
    host = OursHost(args) if args.ours else StockHost(args)
    print("ready", file=replies, flush=True)
    for _ in sys.stdin:
        print(json.dumps(vars(host.turn())), file=replies, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", required=True, help="directory with the unpatched libllama")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--parallel", default="1,2,4,8")
    parser.add_argument("--tokens", type=int, default=4000, help="of history")
    parser.add_argument("--generate", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--kv-budget", type=int, default=1024)
    parser.add_argument("--policy", default=SessionConfig().policy)
    parser.add_argument("--ubatch", type=int, default=512, help="of stock llama.cpp; its own default")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()

    args.model = str(resolve(args.model))
    found = {}
    for number in map(int, args.parallel.split(",")):
        turns: dict[str, list[Turn]] = {BATCH: [], PARALLEL: [], SEPARATE: []}
        with ExitStack() as stack:

            def start(stack: ExitStack = stack, **changes: object) -> Child:
                return stack.enter_context(Child(args, **changes))

            share = max(1, args.threads // number)
            children = {
                BATCH: [start(ours=True, n=number)],
                PARALLEL: [start(ours=False, n=number)],
                SEPARATE: [start(ours=False, n=1, threads=share) for _ in range(number)],
            }
            order = list(children)
            for _ in range(args.repeat):
                for way in order:
                    for child in children[way]:
                        child.begin()
                    turns[way].append(together([child.end() for child in children[way]]))
                    speeds = ", ".join(f"{name} {speed:.1f} tok/s" for name, speed in turns[way][-1].speeds.items())
                    print(f"N = {number}, {way}: {speeds}", file=sys.stderr)
                order = order[1:] + order[:1]
        found[number] = summary(turns)
    print(table(found))
    settings = {name: getattr(args, name) for name in ("tokens", "generate", "kv_budget", "policy", "ubatch", "threads", "repeat")}
    print(json.dumps(settings | {"by_number": found}, indent=1))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(argparse.Namespace(**json.loads(sys.argv[2])))
    else:
        sys.exit(main())
