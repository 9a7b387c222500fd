"""A long chat inside a small budget: speed, memory and the system prompt along the way.

    python tests/measure/long_chat.py --tokens 20000 --kv-budget 1024
"""

import argparse
import json
import os
import statistics
import sys
import time

from kvlocal.benchmark.script import Script
from kvlocal.catalogue import DEFAULT_MODEL, resolve
from kvlocal.engine import Model
from kvlocal.sampling import SamplingParams
from kvlocal.session import ChatSession, SessionConfig

SYSTEM = "You are a patient librarian. End every answer with the word indeed."


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--kv-budget", type=int, default=1024)
    parser.add_argument("--policy", default="gkv")
    parser.add_argument("--json")
    args = parser.parse_args()

    rows = []
    config = SessionConfig(budget=args.kv_budget, policy=args.policy, system=SYSTEM, max_tokens=200, sampling=SamplingParams(seed=5))
    started = time.perf_counter()
    with Model(resolve(args.model)) as model, ChatSession(model, config) as chat:
        script = Script(model, n_answer=1)
        n_system = chat.segments()[0].n_tokens
        while chat.kv.history_tokens < args.tokens:
            "".join(chat.send(script.turn(len(rows)).text))
            tokens = chat._ledger.tokens[..., :n_system]
            row = {
                "history": chat.kv.history_tokens,
                "used": chat.kv.used,
                "tokens_per_second": chat.last.tokens_per_second,
                "answer_tokens": chat.last.answer_tokens,
                "resident": resident_bytes(),
                "position": chat.kv.next_position,
                "system_everywhere": bool((tokens == range(n_system)).all()),
                "indeed": chat.messages[-1]["content"].rstrip(" .!").endswith("indeed"),
            }
            rows.append(row)
            print(f"{row['history']:6d} tokens  {row['used']:5d} cells  {row['tokens_per_second']:6.1f} tok/s  {row['resident'] / 1e6:7.1f} MB", file=sys.stderr)
        kv, seconds = chat.kv, vars(chat.seconds)
    wall = time.perf_counter() - started
    # single turns scatter by a tenth, so ten at each end count, from the first compression on
    full = [row for row in rows if row["answer_tokens"] >= 50 and row["history"] > args.kv_budget + config.stride]
    first, last = full[:10], full[-10:]
    early = next(row for row in rows if row["history"] >= 1000)
    result = {
        "history_tokens": kv.history_tokens,
        "compressions": kv.compressions,
        "rotations": kv.rotations,
        "largest_position": max(row["position"] for row in rows),
        "peak_cells": kv.peak_cells,
        "capacity": kv.capacity,
        "tokens_per_second_at_first_full_budget": statistics.median(row["tokens_per_second"] for row in first),
        "tokens_per_second_at_the_end": statistics.median(row["tokens_per_second"] for row in last),
        "resident_mb_after_1000_tokens": early["resident"] / 1e6,
        "resident_mb_at_the_end": rows[-1]["resident"] / 1e6,
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
