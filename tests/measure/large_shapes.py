"""Memory and one compression of models of a few billion parameters, by models of their shapes with few layers and random weights.

    python tests/measure/large_shapes.py --shapes llama3-8b,qwen3-8b,gemma3-12b --cells 32768 --policies recall,kvzip-snapkv

Each model has the embeddings, heads and feed-forward layers of the one that it is named after, and the vocabulary of another one. In a process of
its own a cache is filled with random keys and values, as they come from an archive, tokens are read behind them, and the cache is compressed. Told
are what was estimated, what llama.cpp says that it allocated, the most memory that the process held, and where the time of the compression went.
With `--cpu` it is the time that the process computes, which other work on the machine does not lengthen; with one thread that is what the clock
would say on a machine of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from shaped_model import SHAPES, write_shaped_model

from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.chat.config import SessionConfig
from kvlocal.doctor.memory_estimate import MemoryEstimate
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.llama.rows import Rows

_LAYERS = {"gemma3": 6}  # one of six has no sliding window


def fill(cache: BudgetedCache, n: int) -> None:
    """Puts n tokens of random keys and values into the cells, which are empty."""
    layout, rng = cache.layout, np.random.default_rng(0)
    shape, chunk = (layout.n_layer, layout.n_head_kv), 1024
    for start in range(0, n, chunk):
        m = min(chunk, n - start)
        rows = Rows(*(
            rng.standard_normal((*shape, m, size), np.float32).astype(np.float16).view(np.uint8)
            for size in (layout.n_embd_head_k, layout.n_embd_row_v)
        ))  # fmt: skip
        there = np.broadcast_to(np.arange(start + m, dtype=np.int32), (*shape, start + m))
        cache.native.compact(there, np.arange(start + m), rows=rows)
    cache.ledger.append(rng.integers(100, cache.model.n_vocab, n).astype(np.int32))


def measure(path: Path, config: SessionConfig, undo: bool) -> dict[str, Any]:
    """One compression of a cache that is as full as it becomes; sizes in bytes."""
    estimate = MemoryEstimate.of(Container(path), config, undo)
    with Model(path) as model, BudgetedCache(model, config, undo=undo) as cache:
        after_loading = resident("VmRSS")
        cache.begin(32)
        cache.ledger.begin_segment("user")
        fill(cache, cache.capacity - config.stride)
        if cache.compressor.recaller:
            cache.compressor.recaller.write_through(cache.ledger)
        text = np.random.default_rng(1).integers(100, model.n_vocab, config.stride).astype(np.int32)
        before, full = asdict(cache.seconds), resident("VmHWM")
        cache.append(text)
        seconds = {name: round(value - before[name], 3) for name, value in asdict(cache.seconds).items() if value > before[name]}
        assert cache.ledger.n_cells == cache.budget
        found = {
            "cells": cache.capacity,
            "layers": [cache.layout.n_layer, model.n_layer],
            "estimate": estimate and estimate.total(cache.capacity)[0],
            "weights": model.size_bytes,
            "cache": cache.context.kv_bytes(),
            "after loading": after_loading,
            "before the compression": full,
            "seconds": seconds,
        }
        found["resident"] = resident("VmHWM")
    return found


def resident(name: str) -> int:
    """Of this process, in bytes, as the kernel says."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama3-8b,qwen3-8b,gemma3-12b")
    parser.add_argument("--cells", type=int, default=32768)
    parser.add_argument("--policies", default="recall,kvzip-snapkv")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, help="of the model; 2, or 6 where one of six has no sliding window, by default")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cpu:
        time.perf_counter = time.process_time
    if args.model:
        config = SessionConfig(budget=args.cells, policy=args.policies, n_threads=args.threads)
        print(json.dumps(measure(args.model, config, undo=True)))
        return
    with tempfile.TemporaryDirectory() as directory:
        for name in args.shapes.split(","):
            shape, path = SHAPES[name], Path(directory, f"{name}.gguf")
            write_shaped_model(resolve(DEFAULT_MODEL), path, replace(shape, n_layer=args.layers or _LAYERS.get(shape.family, 2)))
            for policy in args.policies.split(","):
                command = [sys.executable, __file__, "--model", path, "--cells", args.cells, "--policies", policy, "--threads", args.threads]
                command += ["--cpu"] * args.cpu
                done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
                print(name, policy, json.dumps(json.loads(done.stdout), indent=1), flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
