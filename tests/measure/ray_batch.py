"""A batch on a Ray cluster of this machine: kills at random moments, and throughput against one process.

    python tests/measure/ray_batch.py kills 20
    python tests/measure/ray_batch.py throughput --repeat 3

A kill hits a worker's process, the driver, or all processes of Ray, at once by SIGKILL; the batch is started again until it is finished, on a new
cluster where the old one is gone. No conversation may be lost, doubled or answered otherwise than by one process that nothing interrupts.

Throughput is that of two workers with one thread and half of the streams each, and of one process with two threads and all streams, in turns; tokens
a second are counted from the first line that is read, without loading.
"""

import argparse
import collections
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kill_batch import compared, read_records, write_lines
from ray_cluster import LocalRay

from kvlocal.hub.catalogue import DEFAULT_MODEL

WEIGHTS = {"worker": 6, "driver": 3, "ray": 1}  # how often each is hit


def command(source: Path, target: Path, model: str, *options: object) -> list[str]:
    arguments = [source, "-o", target, "-m", model, "--temp", "0", "--kv-budget", "128", "--stride", "32", *options]
    return [sys.executable, "-m", "kvlocal_cli", "batch", *map(str, arguments)]


def kills(args: argparse.Namespace, directory: Path) -> dict[str, object]:
    rng = random.Random(args.seed)
    source, out, reference = (directory / name for name in ("in.jsonl", "out.jsonl", "reference.jsonl"))
    write_lines(source, args.lines)
    subprocess.run(command(source, reference, args.model, "--threads", 1), capture_output=True)
    expected = {record["line"]: record for record in read_records(reference)}
    if len(expected) != args.lines:
        sys.exit("the run that nothing interrupts did not finish")

    found = collections.Counter({f"kills_of_{kind}": 0 for kind in WEIGHTS})
    cluster = LocalRay()
    try:
        while True:
            on_it = command(source, out, args.model, "--parallel", args.parallel, "--workers", 2, "--ray", cluster.address)
            process = subprocess.Popen(on_it, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            found["starts"] += 1
            for moment in _moments(rng, process, out, args.lines, args.kills - _n_kills(found)):
                time.sleep(moment)
                kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
                if process.poll() is not None:
                    break
                if kind == "driver":
                    process.kill()
                elif kind == "ray":
                    cluster.kill("")
                elif workers := cluster.workers():
                    os.kill(rng.choice(workers), signal.SIGKILL)
                else:
                    continue
                found[f"kills_of_{kind}"] += 1
                if kind == "ray":
                    # the driver says so and ends by itself
                    process.wait(120)
                    cluster.close()
                    cluster = LocalRay()
                if kind != "worker":
                    break
            _, told = process.communicate()
            if b"Traceback" in told:
                sys.exit(told.decode())
            if len(read_records(out)) < args.lines:
                continue
            for name, number in compared(read_records(out), expected).items():
                found[name] += number
            print(json.dumps(found), file=sys.stderr)
            if _n_kills(found) >= args.kills:
                return {"lines": args.lines, "workers": 2, "parallel": args.parallel, **found}
            # once more from the beginning
            out.unlink()
    finally:
        cluster.close()


def _n_kills(found: collections.Counter[str]) -> int:
    return sum(found[f"kills_of_{kind}"] for kind in WEIGHTS)


def _moments(rng: random.Random, process: subprocess.Popen, out: Path, n_lines: int, n: int) -> Iterator[float]:
    """Seconds to wait for each of so many kills, after some more lines each time."""
    for _ in range(n):
        wait_for = len(read_records(out)) + rng.randrange(1 + n_lines // 4)
        while process.poll() is None and len(read_records(out)) < min(wait_for, n_lines):
            time.sleep(0.05)
        yield rng.uniform(0, 1)


def throughput(args: argparse.Namespace, directory: Path) -> dict[str, object]:
    source = directory / "in.jsonl"
    write_lines(source, args.lines)
    speeds = collections.defaultdict(list)
    with LocalRay() as cluster:
        ways = {
            "one_process": ["--parallel", 2 * args.parallel, "--threads", 2],
            "two_workers": ["--parallel", args.parallel, "--workers", 2, "--ray", cluster.address],
        }
        for i in range(args.repeat):
            for way, options in ways.items():
                done = subprocess.run(command(source, directory / f"{way}{i}.jsonl", args.model, *options), capture_output=True, text=True)
                counted = re.search(r"([\d,]+) tokens written in ([\d.]+) s", done.stderr)
                if counted is None:
                    sys.exit(done.stderr)
                speeds[way].append(int(counted[1].replace(",", "")) / float(counted[2]))
                print(f"{way}: {speeds[way][-1]:.1f} tok/s", file=sys.stderr)
    ratios = [two / one for one, two in zip(speeds["one_process"], speeds["two_workers"], strict=True)]
    return {
        "lines": args.lines, "streams": 2 * args.parallel, "load": os.getloadavg()[0],
        "tokens_per_second": {way: [round(speed, 1) for speed in each] for way, each in speeds.items()},
        "ratio": round(statistics.median(ratios), 3),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (kills, throughput):
        each = commands.add_parser(function.__name__)
        each.set_defaults(function=function)
        each.add_argument("--model", default=DEFAULT_MODEL)
        each.add_argument("--lines", type=int, default=40)
        each.add_argument("--parallel", type=int, default=2, help="streams of each worker")
        if function is kills:
            each.add_argument("kills", type=int)
            each.add_argument("--seed", type=int, default=0, help="of the moments")
        else:
            each.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = args.function(args, Path(directory))
    print(json.dumps(found))
    return int(any(found.get(name) for name in ("lost", "doubled", "answers_that_differ")))


if __name__ == "__main__":
    sys.exit(main())
