"""A Nexus file that was not trained: it fits its model, and its tokens mean nothing."""

import numpy as np

from kvlocal.gguf.container import Container
from kvlocal.nexus.base import base_hash
from kvlocal.nexus.file import NexusFile

K = 8


def nexus_file(base, seed=0):
    """A file that fits the base model; a random table and a random adapter for two of its layers."""
    container, rng = Container(base), np.random.default_rng(seed)
    adapter = {}
    for name in ("blk.0.attn_q.weight", "blk.3.ffn_down.weight"):
        n_out, n_in = container.tensors[name].shape
        a, b = rng.standard_normal((4, n_in)) / n_in**0.5, rng.standard_normal((n_out, 4))
        adapter[name] = a.astype(np.float16), b.astype(np.float16)
    table = rng.standard_normal((K, container.metadata["llama.embedding_length"])).astype(np.float32) / 10
    return NexusFile(table, adapter, 4.0, "llama", base.stem, base_hash(container), (0.5, 0.8))
