"""Feeds many mutated inputs to every door and says how many were taken and refused, and what went wrong.

    python tests/measure/fuzz.py 5000 --seed 1 --only model,template

What went wrong is also written to the directory --keep, one file for each input.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from doors import NAMES, doors
from fuzzing import attack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, help="inputs for each door")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    only, n_wrong = options.only.split(","), 0
    if not set(only) <= set(NAMES):
        parser.error(f"--only is a list of these: {','.join(NAMES)}")
    print(f"{'door':<12} {'inputs':>8} {'taken':>8} {'refused':>8} {'wrong':>6} {'seconds':>8}")
    with tempfile.TemporaryDirectory() as directory, doors(Path(directory)) as found:
        for door in found:
            if door.name not in only:
                continue
            started = time.monotonic()
            findings = attack(door, options.n, options.seed)
            n_wrong += len(findings.wrong)
            counts = f"{options.n:>8} {findings.accepted:>8} {findings.refused:>8} {len(findings.wrong):>6}"
            print(f"{door.name:<12} {counts} {time.monotonic() - started:>8.1f}", flush=True)
            for what, times in Counter(what[:200] for what, _ in findings.wrong).most_common():
                print(f"    {times} times: {what}")
            for i, (_, data) in enumerate(findings.wrong if options.keep else ()):
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{door.name.replace(' ', '-')}-{options.seed}-{i}").write_bytes(data)
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()
