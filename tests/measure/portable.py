"""The library of a wheel against the one that was compiled for this machine, in alternation in one run.

    make wheel
    python tests/measure/portable.py --pairs 8 --threads 1 --cpu

Both are the same code; the wheel's has a ggml-cpu for each kind of processor and takes the best one. decode: strides of tokens, each with one
compression, at so many cells. prefill: micro-batches of a user's text, with compressions. chat: turns with answers, compressions and choices of
cells. A ratio is the wheel's speed over the other's, with its 95 % interval; of score, compact and recall, which are parts of the chat, it is one of
seconds, where less is better. With --cpu time is what the processes compute, which other work on the machine does not lengthen (Linux); with one
thread that is what the clock would say on a machine of its own.
"""

import argparse
import json
import os
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from kvlocal.benchmark.comparison import Comparison, of_pairs, of_speeds, of_totals
from kvlocal.benchmark.measures import Side, alternate
from kvlocal.benchmark.process import Worker
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve

ROOT = Path(__file__).parents[2]
STRIDE, UBATCH = 128, 256


def show(label: str, done: int, of: int) -> None:
    if done == 0:
        print(label, file=sys.stderr, flush=True)


class ComputingSide(Side):
    """A side whose time is that which its process computes, in seconds."""

    def timed(self, do: str, **arguments: int) -> float:
        before = self._computed()
        self.worker.call(do, reader=self.reader, **arguments)
        return self._computed() - before

    def slice(self, n: int) -> float:
        return self.timed("slice", n=n, at_once=self.at_once) if n else 0.0

    def _computed(self) -> float:
        fields = Path(f"/proc/{self.worker.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class ClockSide(Side):
    """A side whose time is the clock's, in seconds."""

    def timed(self, do: str, **arguments: int) -> float:
        return self.worker.call(do, reader=self.reader, **arguments)


def started(stack: ExitStack, model: str, lib_dir: Path | None) -> Worker:
    """A process with the library of a directory, or with the installed one."""
    if lib_dir:
        os.environ["KVLOCAL_LIB_DIR"] = str(lib_dir)
    try:
        return stack.enter_context(Worker("the wheel's" if lib_dir else "the installed one", stock=None, model=model, n_answer=60))
    finally:
        os.environ.pop("KVLOCAL_LIB_DIR", None)


def compared(args: argparse.Namespace, lib_dir: Path) -> list[Comparison]:
    with ExitStack() as stack:
        workers = [started(stack, str(resolve(args.model)), each) for each in (lib_dir, None)]
        config = {"budget": args.cells, "stride": STRIDE, "n_ubatch": UBATCH, "policy": args.policy, "n_threads": args.threads}
        sides = [(ComputingSide if args.cpu else ClockSide)(worker, "session", STRIDE) for worker in workers]
        for side in sides:
            side.worker.call("open_session", reader="session", config=config)
        # turns first: they begin without a history
        turns: list[list[dict[str, float]]] = [[], []]
        for turn in range(0 if args.cpu else args.turns):
            show("chat", turn, args.turns)
            for i in (0, 1) if turn % 2 else (1, 0):
                turns[i].append(workers[i].call("turn", reader="session"))
        for side in sides:
            side.extend(2 * args.cells, "history", show)
            side.align()
        decode = STRIDE / alternate(sides, args.pairs, 4, "decode", show)
        prefill = np.zeros((args.pairs, 2))
        for pair in range(args.pairs):
            show("prefill", pair, args.pairs)
            for i in (0, 1) if pair % 2 else (1, 0):
                prefill[pair, i] = 2 * UBATCH / sides[i].timed("read_text", n=2 * UBATCH)
    rows = [of_pairs("decode", *decode.T, unit="tokens/s"), of_pairs("prefill", *prefill.T, unit="tokens/s")]
    if args.cpu:
        return rows
    seconds = [[turn["seconds"] for turn in each] for each in turns]
    parts = [
        of_totals(name, *([turn[name] for turn in each] for each in turns), unit="s") for name in ("score", "compact", "recall")
        if all(any(turn[name] for turn in each) for each in turns)
    ]  # fmt: skip
    return [*rows, of_speeds("chat", int(sum(turn["tokens"] for turn in turns[0])), *seconds), *parts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="the newest in dist unless told")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--policy", default="recall")
    parser.add_argument("--cells", type=int, default=1024, help="budget")
    parser.add_argument("--threads", type=int, help="one per core unless told")
    parser.add_argument("--cpu", action="store_true", help="seconds of computing instead of the clock's; chat and its parts are left out")
    parser.add_argument("--turns", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    wheel = args.wheel or max(ROOT.glob("dist/kvlocal-*.whl"), key=lambda path: path.stat().st_mtime, default=None)
    if wheel is None:
        sys.exit("there is no wheel: run `make wheel`, or name one")
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        # what auditwheel adds lies beside the package
        archive.extractall(directory)
        rows = compared(args, Path(directory) / "kvlocal" / "lib")
    for row in rows:
        print(f"{row.name}: {row.ours:.4g} against {row.other:.4g} {row.unit}, {row.ratio:.3f} [{row.lo:.3f}, {row.hi:.3f}]")
    print(json.dumps({"wheel": wheel.name, "load": os.getloadavg()[0]} | {key: value for key, value in vars(args).items() if key != "wheel"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
