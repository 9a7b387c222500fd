"""Decode with the query ring on against stock llama.cpp, at the same number of cells, in one run.

    make stock && python tests/measure/ring_overhead.py --stock build/stock/dist/lib --cells 1024

Two processes, each with its own library, take turns with bursts of single tokens; the ratio of each pair of bursts counts.
"""

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time


def child(model_path: str, n_cells: int, n_burst: int, window: int, gpu_layers: int) -> None:
    """Fills n_cells, then decodes a burst for each line of standard input and prints its seconds."""
    import llama_cpp
    from llama_cpp import llama_cpp as low

    low.llama_backend_init()
    params = low.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    model = low.llama_model_load_from_file(model_path.encode(), params)
    options = low.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = n_cells + 512, 256, 256
    options.flash_attn_type, options.kv_unified, options.no_perf = 1, False, True
    options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
    context = low.llama_init_from_model(model, options)
    if window:
        low._lib.kvl_ring_enable.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        assert low._lib.kvl_ring_enable(context, window) == 0
    rng = random.Random(1)
    token = (low.llama_token * 256)(*(rng.randrange(100, 40000) for _ in range(256)))
    memory = low.llama_get_memory(context)
    for start in range(0, n_cells, 256):
        assert low.llama_decode(context, low.llama_batch_get_one(token, min(256, n_cells - start))) == 0
    for _ in sys.stdin:
        low.llama_memory_seq_rm(memory, 0, n_cells, -1)
        started = time.perf_counter()
        for i in range(n_burst):
            assert low.llama_decode(context, low.llama_batch_get_one((low.llama_token * 1)(token[i % 256]), 1)) == 0
            low.llama_get_logits_ith(context, -1)[0]
        print(time.perf_counter() - started, flush=True)
    assert llama_cpp.__version__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", required=True, help="directory with the unpatched libllama")
    parser.add_argument("--model", default="")
    parser.add_argument("--cells", type=int, default=1024)
    parser.add_argument("--burst", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--gpu-layers", type=int, default=0, help="of both, -1 for all")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.model, args.cells, args.burst, args.window, args.gpu_layers)
        return 0

    from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
    from kvlocal.llama.library import load

    library = load()
    bindings = os.path.dirname(os.path.dirname(library.llama_cpp.__file__))
    model = str(resolve(args.model or DEFAULT_MODEL))

    def start(lib_dir: str, window: int) -> subprocess.Popen:
        env = os.environ | {"LLAMA_CPP_LIB_PATH": lib_dir, "PYTHONPATH": bindings}
        command = [sys.executable, __file__, "--child", "--stock", "-", "--model", model, "--cells", str(args.cells)]
        command += ["--burst", str(args.burst), "--window", str(window), "--gpu-layers", str(args.gpu_layers)]
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    ours, stock = start(str(library.lib_dir), args.window), start(os.path.abspath(args.stock), 0)

    def burst(process: subprocess.Popen) -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    burst(ours), burst(stock)
    ratios, speeds = [], []
    for i in range(args.pairs):
        order = (ours, stock) if i % 2 else (stock, ours)
        seconds = {process: burst(process) for process in order}
        ratios.append(seconds[stock] / seconds[ours])
        speeds.append(args.burst / seconds[stock])
    for process in (ours, stock):
        process.stdin.close()
        process.wait()
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    print(json.dumps({
        "cells": args.cells,
        "speed_relative_to_stock": round(statistics.median(ratios), 4),
        "interval_95": [round(medians[50], 4), round(medians[1950], 4)],
        "pairs": args.pairs,
        "stock_tokens_per_second": round(statistics.median(speeds), 1),
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
