"""What choosing the cells anew from an archive costs, beside the tokens of an answer.

    python tests/measure/recall_time.py --model smollm2-135m --threads 2 --tokens 1000,8000,100000
    python tests/measure/recall_time.py --rpc 127.0.0.1:50052 --threads 1 --tokens 8000 --late 0,4

A text of 2,000 tokens at most is read, and longer histories are that text again and again in the archive, at the positions they would have. Then
tokens are decoded behind a close choice, and every `refresh` of them the cells are chosen anew. Milliseconds, the median, for each part of a choice,
and the share of the time of an answer that choosing takes; where choices are late, as on a device, what is found meanwhile is no part of it, but what
is waited for. What it wins to find them beside decoding shows in the time of a token with choosing, at `--late 0` and later. With `--cpu` it is the
time that this process computes, which other work on the machine does not lengthen; with one thread that is what the clock would say on a machine of
its own.
"""

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvlocal.cache.archive import Archive
from kvlocal.cache.budgeted import BudgetedCache, Passage
from kvlocal.cache.config import CacheConfig
from kvlocal.cache.frames import first_position
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.host_queries import HostQueries
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement
from kvlocal.llama.rows import Rows
from kvlocal.llama.rpc import servers_of
from kvlocal.policies import Recall

READ = 2000
LATE = "late"  # what takes effect later: asked for after every token

clock = time.perf_counter


def text_of(model: Model, data: Path | None, n: int) -> np.ndarray:
    """Tokens of the dialogues of a file, or any."""
    if data is None:
        return np.random.default_rng(0).integers(100, model.n_vocab, n).astype(np.int32)
    turns = [turn[who] for line in data.read_text().splitlines()[:551] for turn in json.loads(line)["history"] for who in ("user", "bot")]
    return model.tokenize("\n".join(turns[:400]), parse_special=False)[:n]


def lengthen(cache: BudgetedCache, n_tokens: int) -> None:
    """Makes the conversation n_tokens long, of which the archive holds what it held, again and again, before what is in the cells."""
    ledger, compressor = cache.ledger, cache.compressor
    assert compressor.recaller
    cache.compress()
    old, n_old = compressor.recaller.archive, ledger.n_tokens
    more = n_tokens - n_old
    rows = Rows(*(np.concatenate([getattr(chunk, name) for chunk in old.chunks()], axis=2)[:, :, :n_old] for name in ("k", "v")))
    compressor.open_archive(Archive(cache.layout, 2**40, None))
    archive, next_position = compressor.recaller.archive, 0
    while archive.n_tokens < n_tokens:
        n = min(n_old, n_tokens - archive.n_tokens)
        positions = []
        for _ in range(n):
            if next_position == cache.model.n_ctx_train:
                next_position = first_position(ledger.n_pinned, cache.model.n_ctx_train, 1280, ledger.n_cells)
            positions.append(next_position)
            next_position += 1
        # the last ones are those in the cells
        part = slice(n_old - n, n_old)
        archive.append(Rows(rows.k[:, :, part], rows.v[:, :, part]), np.array(positions, np.int32))
    held = ledger.tokens[..., : ledger.n_cells]
    held[held >= ledger.n_pinned] += more
    ledger._ids = np.concatenate([ledger._ids, np.zeros(more, np.int32)])
    ledger.n_tokens, ledger.segments[-1].end = n_tokens, n_tokens
    # their keys are not where they would be, which costs no time
    shift = next_position - ledger.next_position
    ledger.positions[..., : ledger.n_cells] = compressor.recaller.positions(ledger, next_position)[held]
    cache.native.compact(
        np.broadcast_to(np.arange(ledger.n_cells), held.shape),
        np.arange(next_position - ledger.n_cells, next_position),
        np.full(held.shape, shift, np.int32),
    )
    ledger.next_position = next_position


@contextmanager
def timed(times: dict[str, list[float]], name: str, owner: Any, method: str) -> Iterator[None]:
    """What a method of an object, or of all objects of a class, takes, in milliseconds."""
    function: Callable[..., Any] = getattr(owner, method)
    own = vars(owner).get(method)

    def call(*args: Any, **options: Any) -> Any:
        started = clock()
        try:
            return function(*args, **options)
        finally:
            times[name].append(1000 * (clock() - started))

    setattr(owner, method, call)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, method)
        else:
            setattr(owner, method, own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--data", type=Path, help="MT-Bench-101's file of dialogues; without it the tokens are any")
    parser.add_argument("--gpu-layers", type=int, default=0, help="-1 for all")
    parser.add_argument("--rpc", default="", help="HOST:PORT of the server that holds all layers")
    parser.add_argument("--late", default=str(Recall().late), help="tokens before a choice takes effect, where the cells are on a device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", default="1000,8000,100000")
    parser.add_argument("--answer", type=int, default=160)
    parser.add_argument("--kv-budget", type=int, default=1024)
    parser.add_argument("--type", default="f16")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        global clock
        clock = time.process_time
    config = CacheConfig(
        budget=args.kv_budget, policy="recall", archive="ram", archive_ram=2**40, n_threads=args.threads, type_k=args.type, type_v=args.type
    )
    placement = Placement(ALL if args.rpc else args.gpu_layers, rpc=servers_of(args.rpc) if args.rpc else ())
    with Model(resolve(args.model), placement=placement) as model:
        text = text_of(model, args.data, READ + args.answer)
        for n_tokens, late in itertools.product(map(int, args.tokens.split(",")), map(int, args.late.split(","))):
            with BudgetedCache(model, replace(config, policy_args={"late": late}), undo=False) as cache:
                cache.begin(30)
                cache.read([Passage("user", text[: min(READ, n_tokens)])])
                if n_tokens > READ:
                    lengthen(cache, n_tokens)
                report(cache, text[-args.answer :], n_tokens)


def report(cache: BudgetedCache, answer: np.ndarray, n_tokens: int) -> None:
    compressor, times = cache.compressor, defaultdict[str, list[float]](list)
    recaller = compressor.recaller
    assert recaller
    parts = (
        ("write through", recaller, "write_through"), ("queries", cache.native, "copy_queries"), ("scores", HostQueries, "row_scores"),
        ("best rows", HostQueries, "best_rows"), ("refill", recaller, "refill"), ("wait", compressor._later, "take"),
        ("compact", cache.native, "compact"), ("ledger", cache.ledger, "refill"), ("all", compressor, "choose_again"),
        (LATE, compressor, "take_choice"),
    )  # fmt: skip
    plan = Recall.plan
    # as behind a question, where it is done twice
    for token in answer[:16]:
        cache.append(np.array([token]), "decode")
    compressor.chosen_at, started = 0, clock()
    compressor.choose_again(cache.ledger, Recall().refresh + 1, Recall().for_question, closely=True)
    print(f"{n_tokens} tokens, choices late by {compressor.late}: a choice behind a question {1000 * (clock() - started):.0f} ms")

    def timed_plan(self: Recall, *args: Any) -> Any:
        started = clock()
        result = plan(self, *args)
        times["plan"].append(1000 * (clock() - started))
        return result

    Recall.plan = timed_plan  # type: ignore[method-assign]
    recalled = []
    started = clock()
    try:
        with ExitStack() as stack:
            for name, owner, method in parts:
                stack.enter_context(timed(times, name, owner, method))
            for token in answer:
                cache.append(np.array([token]), "decode")
                recalled.append(compressor.n_recalled)
    finally:
        Recall.plan = plan  # type: ignore[method-assign]
    choosing = (sum(times["all"]) + sum(times.pop(LATE, []))) / 1000
    decoding = clock() - started - choosing
    print(f"    a token {1000 * decoding / len(answer):.1f} ms, with choosing {1000 * (decoding + choosing) / len(answer):.1f}", end="; ")
    share = choosing / (choosing + decoding)
    print(f"a choice every {Recall().refresh} of them, share of choosing {share:.3f}, {np.median(recalled):.0f} cells exchanged")
    for name, values in times.items():
        print(f"    {name:22s} {statistics.median(values):8.2f} ms")


if __name__ == "__main__":
    main()
