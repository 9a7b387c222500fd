"""What reading a long text takes beside decoding it, by how far the cache may grow meanwhile.

    python tests/measure/read_time.py --gpu-layers -1 --read-stride 128,512
    python tests/measure/read_time.py --rpc 127.0.0.1:50052 --threads 1 --policy gkv

One text of the user's is read from its beginning, with each stride in turn. Seconds of decoding, of choosing cells (recall) or of scores, planning
and compaction, what share of the whole that is, and how often cells were removed.
"""

import argparse
from typing import Any

import numpy as np

from kvlocal.cache.budgeted import BudgetedCache, Passage
from kvlocal.cache.config import CacheConfig
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement
from kvlocal.llama.rpc import servers_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--gpu-layers", type=int, default=0, help="-1 for all")
    parser.add_argument("--rpc", default="", help="HOST:PORT of the server that holds all layers")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--policy", default="recall")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--kv-budget", type=int, default=1024)
    parser.add_argument("--read-stride", default="128,256,512,1024")
    parser.add_argument("--again", type=int, default=1, help="how often all of them")
    args = parser.parse_args()
    placement = Placement(ALL if args.rpc else args.gpu_layers, rpc=servers_of(args.rpc) if args.rpc else ())
    strides = [int(text) for text in args.read_stride.split(",")]
    with Model(resolve(args.model), placement=placement) as model:
        text = np.random.default_rng(0).integers(100, model.n_vocab, args.tokens).astype(np.int32)
        for stride in args.again * strides:
            config = CacheConfig(budget=args.kv_budget, policy=args.policy, read_stride=stride, n_threads=args.threads)
            with BudgetedCache(model, config, undo=False) as cache:
                print(f"{args.tokens} tokens, {stride} at once: {read(cache, text)}", flush=True)


def read(cache: BudgetedCache, text: np.ndarray) -> str:
    """Reads the text, and says what that took."""
    decode, synchronize = cache.context.decode, cache.context.synchronize

    def decode_whole(*given: Any, **options: Any) -> None:
        decode(*given, **options)
        # a device goes on after the call, and what comes next would wait for it
        synchronize()

    cache.context.decode = decode_whole  # type: ignore[method-assign]
    cache.read([Passage("user", text)])
    seconds = cache.seconds
    beside = seconds.score + seconds.plan + seconds.compact + seconds.recall
    return (
        f"{seconds.prefill:.2f} s to decode, {beside:.2f} s beside it, {beside / (beside + seconds.prefill):.3f} of all; "
        f"cells were removed {cache.compressor.compressions} times"
    )


if __name__ == "__main__":
    main()
