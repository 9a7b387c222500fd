"""What scoring, compacting and moving rows cost beside a decoded token, on the device that holds the cells.

    python tests/measure/cell_operations.py --model smollm2-135m --gpu-layers -1 --cells 1152 --keep 1024

Milliseconds, the median of some repetitions, and each as so many decoded tokens.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model

W = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--gpu-layers", type=int, default=0, help="-1 for all")
    parser.add_argument("--cells", type=int, default=1152)
    parser.add_argument("--keep", type=int, default=1024)
    parser.add_argument("--type", default="f16", help="of the cache")
    parser.add_argument("--repeat", type=int, default=12)
    args = parser.parse_args()
    with Model(resolve(args.model), n_gpu_layers=args.gpu_layers) as model:
        context = Context(model, n_cells=args.cells + 256, n_ubatch=256, type_k=args.type, type_v=args.type, n_outputs=1)
        native = NativeCache(context.pointer)
        native.enable_ring(W)
        text = np.random.default_rng(0).integers(100, model.n_vocab, 2 * args.cells).astype(np.int32)

        def fill() -> None:
            context.clear()
            for start in range(0, args.cells, 256):
                context.decode(text[start : min(start + 256, args.cells)], start)
            context.synchronize()

        def token() -> None:
            context.decode(text[:1], native.n_cells())
            context.logits()

        fill()
        layout = native.layout()
        heads = (layout.n_layer, layout.n_head_kv)
        rng = np.random.default_rng(1)
        keep = np.sort(np.argsort(rng.random((*heads, args.cells)), axis=-1)[..., : args.keep], axis=-1)
        recent = np.arange(args.cells - 128, args.cells)
        rows = native.read_rows(np.arange(args.keep // 2))
        mixed = keep.copy()
        mixed[..., : args.keep // 2] = args.cells + np.arange(args.keep // 2)
        positions = np.arange(args.cells - args.keep, args.cells)
        delta = np.broadcast_to(positions - 7, keep.shape) - keep
        operations: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
            "token": (token, None),
            "scores": (native.scores, None),
            "redundancy": (native.redundancy, None),
            "read 128 rows": (lambda: native.read_rows(recent), None),
            "read all rows": (lambda: native.read_rows(np.arange(args.cells)), None),
            "compact": (lambda: native.compact(keep, positions), fill),
            "compact, half brought along": (lambda: native.compact(mixed, positions, rows=rows), fill),
            "compact, rotated": (lambda: native.compact(keep, positions, np.ascontiguousarray(delta)), fill),
        }
        milliseconds = {}
        for name, (operation, before) in operations.items():
            fill()
            times = []
            for _ in range(args.repeat):
                if before:
                    before()
                context.synchronize()
                started = time.perf_counter()
                operation()
                context.synchronize()
                times.append(1000 * (time.perf_counter() - started))
            milliseconds[name] = statistics.median(times)
    result = {
        "cells": args.cells,
        "keep": args.keep,
        "layers and KV heads": heads,
        "bytes a token": int(rows.k[:, :, :1].nbytes + rows.v[:, :, :1].nbytes),
        "milliseconds": {name: round(value, 3) for name, value in milliseconds.items()},
        "tokens": {name: round(value / milliseconds["token"], 2) for name, value in milliseconds.items()},
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
