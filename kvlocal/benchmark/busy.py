"""How fast answers come while another program has one core for itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Self

import numpy as np

from kvlocal.benchmark.comparison import Comparison, of_pairs
from kvlocal.benchmark.measures import Bench, Side
from kvlocal.benchmark.settings import BenchSettings
from kvlocal.llama.free_cores import AUTO

# It ends as soon as nobody holds the other end of its standard input any more, however that came about.
_PROGRAM = """
import os, sys, threading
def watch():
    sys.stdin.buffer.read()
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
print(flush=True)
while True:
    pass
"""
# slices before a number counts, in which the threads find out how many cores are free
_SETTLING = 3


class OtherProgram:
    """A program that computes all the time, in one thread, for a `with` block."""

    def __enter__(self) -> Self:
        # Ctrl-C is for us alone
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout
        self._process.stdout.readline()
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def busy_names(settings: BenchSettings) -> list[str]:
    return ["decode@busy", "decode@busy-quiet"]


def measure_busy(bench: Bench, wanted: Collection[str]) -> Iterator[Comparison]:
    """Decoding with as many cells on average, as in decode@equal-cells, while a program that was started for it has one core.

    The threads are those of a chat: as many as there are cores free, unless the settings say how many. decode@busy is against stock llama.cpp in the
    same minutes; decode@busy-quiet is against another session of ours, in the pauses of that program.
    """
    settings = bench.settings
    n_plain = settings.parts * settings.piece
    config = settings.session(settings.cells - settings.stride // 2, None) | {"n_threads": settings.n_threads or AUTO}
    with ExitStack() as stack:
        busy, quiet, stock = bench.workers(stack, 2)
        stock.call("open_plain", reader="full", context=settings.context(settings.cells + settings.n_ubatch))
        beside = [Side(busy, "session", settings.stride), Side(stock, "full", n_plain)]
        alone = Side(quiet, "session", settings.stride)
        for side in (*beside, alone):
            if side.reader == "session":
                side.worker.call("open_session", reader="session", config=config)
            side.extend(settings.cells + settings.stride, "busy", bench.progress)
            if side.reader == "session":
                side.align()
        speeds = np.zeros((settings.pairs, 3))
        for pair in range(settings.pairs):
            with OtherProgram():
                for _ in range(1 if pair else _SETTLING):
                    beside[0].slice(settings.stride)
                for i in (0, 1) if pair % 2 else (1, 0):
                    bench.progress("decode@busy", 2 * pair, 2 * settings.pairs)
                    speeds[pair, i] = beside[i].n / beside[i].slice(beside[i].n)
            bench.progress("decode@busy", 2 * pair + 1, 2 * settings.pairs)
            speeds[pair, 2] = alone.n / alone.slice(alone.n)
    for name, other in zip(busy_names(settings), (1, 2), strict=True):
        if name in wanted:
            yield of_pairs(name, speeds[:, 0], speeds[:, other], "tokens/s")
