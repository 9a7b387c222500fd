"""Throughput of a batch by the number of conversations that decode together, in one run.

    python tests/measure/batch_throughput.py --parallel 1,2,4,8

The numbers take turns, as often as --repeat says, so that what else the machine does meets all of them; a ratio is that of neighbouring turns to
the one with the first number, and its median counts. Besides the wall clock, the processor time of a token is told, which other processes disturb
less.
"""

import argparse
import json
import statistics
import sys
import time

from kvlocal.batch.run import run_batch
from kvlocal.chat.config import SessionConfig
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams

TOPICS = ("whales", "bridges", "bread", "glaciers", "violins", "deserts", "clocks", "maps")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--parallel", default="1,2,4,8")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--kv-budget", type=int, default=1024)
    parser.add_argument("--policy", default=SessionConfig().policy)
    parser.add_argument("--temp", type=float, default=0.7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()

    numbers = [int(number) for number in args.parallel.split(",")]
    sampling = SamplingParams(temperature=args.temp, seed=1)
    config = SessionConfig(budget=args.kv_budget, policy=args.policy, max_tokens=args.max_tokens, sampling=sampling, n_threads=args.threads)
    lines = [
        json.dumps({"id": i, "messages": [{"role": "user", "content": f"Tell me {i + 3} things about {TOPICS[i % 8]}."}]}).encode()
        for i in range(args.conversations)
    ]
    speeds = {number: [] for number in numbers}
    cpu = {number: [] for number in numbers}
    answers = {}
    with Model(resolve(args.model)) as model:
        for _ in range(args.repeat):
            for number in numbers:
                started, used = time.perf_counter(), time.process_time()
                results = list(run_batch(lines, model, config, parallel=number, ordered=True))
                n_tokens = sum(result.timings["answer_tokens"] for result in results)
                speeds[number].append(n_tokens / (time.perf_counter() - started))
                cpu[number].append(1000 * (time.process_time() - used) / n_tokens)
                answers[number] = [result.messages for result in results]
                print(f"N = {number}: {speeds[number][-1]:.1f} tok/s, {cpu[number][-1]:.1f} ms of processor time per token", file=sys.stderr)
    first = numbers[0]
    print(json.dumps({
        "conversations": args.conversations,
        "tokens_per_second": {number: round(statistics.median(speeds[number]), 2) for number in numbers},
        "ratio": {number: round(statistics.median(a / b for a, b in zip(speeds[number], speeds[first], strict=True)), 3) for number in numbers},
        "cpu_ms_per_token": {number: round(statistics.median(cpu[number]), 2) for number in numbers},
        "answers_that_differ": {number: sum(a != b for a, b in zip(answers[number], answers[first], strict=True)) for number in numbers},
    }, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
