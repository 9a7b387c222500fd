"""A long chat inside a small budget: speed, memory and the system prompt along the way.

    python tests/measure/long_chat.py --tokens 20000 --kv-budget 1024
    python tests/measure/long_chat.py --answer-tokens 100000 --plot soak.png
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from kvlocal.benchmark.script import Script
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.evaluation import figure
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams

SYSTEM = "You are a patient librarian. End every answer with the word indeed."


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def draw(rows: list[dict], target: Path) -> None:
    """Resident memory, cells and speed by the tokens that the model has written."""
    picture = figure.new_figure(8, 6)
    panels = picture.subplots(3, sharex=True)
    x = [row["answer_tokens_so_far"] for row in rows]
    for panel, label, y in zip(
        panels,
        ("resident MB", "cells", "tokens per second"),
        ([row["resident"] / 1e6 for row in rows], [row["used"] for row in rows], [row["tokens_per_second"] for row in rows]),
        strict=True,
    ):
        panel.plot(x, y, linewidth=0.8)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("tokens written")
    figure.save(picture, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=20_000, help="of the whole conversation")
    parser.add_argument("--answer-tokens", type=int, default=0, help="that the model is to write; the conversation goes on until both are reached")
    parser.add_argument("--kv-budget", type=int, default=1024)
    parser.add_argument("--policy", default="gkv")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gpu-layers", type=int, default=0, help="-1 for all")
    parser.add_argument("--json")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.plot:
        figure.check(args.plot)

    rows = []
    sampling = SamplingParams(seed=5)
    config = SessionConfig(budget=args.kv_budget, policy=args.policy, system=SYSTEM, max_tokens=200, sampling=sampling, n_threads=args.threads)
    answer_tokens = 0
    started = time.perf_counter()
    with Model(resolve(args.model), n_gpu_layers=args.gpu_layers) as model, ChatSession(model, config) as chat:
        script = Script(model, n_answer=1)
        n_system = chat.segments()[0].n_tokens
        while chat.kv.history_tokens < args.tokens or answer_tokens < args.answer_tokens:
            "".join(chat.send(script.turn(len(rows)).text))
            tokens = chat.cache.ledger.tokens[..., :n_system]
            answer_tokens += chat.last.answer_tokens
            row = {
                "history": chat.kv.history_tokens,
                "used": chat.kv.used,
                "tokens_per_second": chat.last.tokens_per_second,
                "answer_tokens": chat.last.answer_tokens,
                "answer_tokens_so_far": answer_tokens,
                "resident": resident_bytes(),
                "handles": len(os.listdir("/proc/self/fd")),
                "position": chat.kv.next_position,
                "system_everywhere": bool((tokens == range(n_system)).all()),
                "indeed": chat.messages[-1]["content"].rstrip(" .!").endswith("indeed"),
            }
            rows.append(row)
            size = f"{row['history']:6d} tokens  {row['used']:5d} cells"
            print(f"{size}  {row['tokens_per_second']:6.1f} tok/s  {row['resident'] / 1e6:7.1f} MB", file=sys.stderr)
        kv, seconds = chat.kv, vars(chat.seconds)
    wall = time.perf_counter() - started
    # single turns scatter by a tenth, so ten at each end count, from the first compression on
    full = [row for row in rows if row["answer_tokens"] >= 50 and row["history"] > args.kv_budget + config.stride]
    first, last = full[:10], full[-10:]
    # a conversation may be shorter
    n_early, n_settled = (next((i for i, row in enumerate(rows) if row["answer_tokens_so_far"] >= n), len(rows) - 1) for n in (1000, 5000))
    early, settled = rows[n_early], rows[n_settled]
    result = {
        "answer_tokens": answer_tokens,
        "history_tokens": kv.history_tokens,
        "compressions": kv.compressions,
        "rotations": kv.rotations,
        "largest_position": max(row["position"] for row in rows),
        "peak_cells": kv.peak_cells,
        "capacity": kv.capacity,
        "tokens_per_second_at_first_full_budget": statistics.median(row["tokens_per_second"] for row in first),
        "tokens_per_second_at_the_end": statistics.median(row["tokens_per_second"] for row in last),
        "resident_mb_after_1000_written": early["resident"] / 1e6,
        "resident_mb_after_5000_written": settled["resident"] / 1e6,
        "largest_resident_mb_afterwards": max(row["resident"] for row in rows[n_settled:]) / 1e6,
        "resident_mb_at_the_end": rows[-1]["resident"] / 1e6,
        "handles_after_5000_written": settled["handles"],
        "handles_at_the_end": rows[-1]["handles"],
        "system_prompt_in_every_head_after_every_turn": all(row["system_everywhere"] for row in rows),
        "answers_that_obey_it": f"{sum(row['indeed'] for row in rows)} of {len(rows)}",
        "share_of_scoring_planning_compacting": (seconds["score"] + seconds["plan"] + seconds["compact"]) / sum(seconds.values()),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "wall_seconds": round(wall, 1),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result | {"turns": rows}, file)
    if args.plot:
        draw(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
