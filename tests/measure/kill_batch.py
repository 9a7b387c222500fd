"""Kills a batch at random moments and starts it again until it is finished: no conversation may be lost, doubled or answered otherwise.

    python tests/measure/kill_batch.py 25 --parallel 4

The answers are compared with those of a run with --parallel 1 that nothing interrupts. They are greedy, so they are equal wherever llama.cpp
rounds the same whatever stands in a batch, as for the default model; where it does not, the number of those that differ tells how often that shows.
"""

import argparse
import collections
import json
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from kvlocal.hub.catalogue import DEFAULT_MODEL


def write_lines(path: Path, n: int) -> None:
    """Conversations of one or two open turns; every fourth is compressed on the way, every seventh cannot be answered."""
    with path.open("w") as file:
        for i in range(n):
            text = " ".join(f"Item {k} costs {(k * 7 + i) % 23} coins." for k in range(20 if i % 4 == 3 else 0))
            turns = [f"{text} What do you know about the number {i}?", "Say more."][: 1 + i % 2]
            line = {"id": i, "messages": [{"role": "user", "content": turn} for turn in turns], "max_tokens": 4 + 5 * (i % 5)}
            file.write(json.dumps(line | ({"policy": "none"} if i % 7 == 6 else {})) + "\n")


def read_records(path: Path) -> list[dict]:
    """The whole lines; what follows the last of them may be half of one."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--lines", type=int, default=80)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        source, out, reference = (Path(directory) / name for name in ("in.jsonl", "out.jsonl", "reference.jsonl"))
        write_lines(source, args.lines)

        def start(target: Path, parallel: int) -> subprocess.Popen:
            options = ["-m", args.model, "--temp", "0", "--kv-budget", "128", "--stride", "32", "--threads", args.threads, "--parallel", parallel]
            command = [sys.executable, "-m", "kvlocal_cli", "batch", source, "-o", target, *options]
            return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

        process = start(reference, 1)
        _, told = process.communicate()
        expected = {record["line"]: record for record in read_records(reference)}
        if len(expected) != args.lines:
            sys.exit(told.decode())

        found = collections.Counter({"kills": 0, "runs": 0, "lost": 0, "doubled": 0, "failures": 0, "answers_that_differ": 0, "torn_lines": 0})
        while True:
            kills = found["kills"]
            n_before = len(read_records(out))
            process = start(out, args.parallel)
            if kills < args.kills:
                # a run is killed once it has written so many lines and for so long afterwards, so that the kills are spread over all of it
                wait_for = n_before + rng.randrange(1 + 2 * (args.lines - n_before) // (args.kills - kills + 1))
                while process.poll() is None and len(read_records(out)) < wait_for:
                    _pause(process, 0.01)
                _pause(process, rng.uniform(0, 0.5))
            if kills < args.kills and process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                found["kills"] += 1
                found["torn_lines"] += out.exists() and not out.read_bytes().endswith(b"\n") and out.stat().st_size > 0
                continue
            _, told = process.communicate()
            if process.returncode not in (0, 1):
                sys.exit(told.decode())
            found.update(compared(read_records(out), expected))
            if kills == args.kills:
                break
            # it was finished before it could be killed: once more from the beginning
            out.unlink()
        print(json.dumps({"lines": args.lines, "parallel": args.parallel, **found}))
        return int(found["lost"] > 0 or found["doubled"] > 0)


def compared(records: list[dict], expected: dict[int, dict]) -> dict[str, int]:
    """How the records of a finished run differ from what was expected, by line."""
    counts = collections.Counter(record["line"] for record in records)
    outcome = ("id", "messages", "stop_reasons", "kv", "error")
    return {
        "runs": 1,
        "lost": len(expected) - len(counts),
        "doubled": sum(count - 1 for count in counts.values()),
        "failures": sum("error" in record for record in records),
        "answers_that_differ": sum(any(record.get(name) != expected[record["line"]].get(name) for name in outcome) for record in records),
    }


def _pause(process: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


if __name__ == "__main__":
    sys.exit(main())
