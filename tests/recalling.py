"""What the tests of archives and of recall from them have in common."""

import dataclasses

import numpy as np

from kvlocal.cache.archive import Archive
from kvlocal.cache.config import CacheConfig
from kvlocal.chat.stats import SegmentStats
from kvlocal.llama.rows import Rows

# one thread: two that wait for each other crawl when the machine is busy
CONFIG = CacheConfig(budget=96, policy="recall", stride=32, n_ubatch=64, n_threads=1, archive="ram")


def tokens(n: int, seed: int = 0) -> np.ndarray:
    """Random ones, int32 [n]."""
    return np.random.default_rng(seed).integers(100, 40000, n).astype(np.int32)


def rows_of(archive: Archive, numbers: np.ndarray) -> Rows:
    """The rows of token numbers[l, h, j] of each layer and head, int [L, H, n]."""
    n_layer, n_head, _ = numbers.shape
    found = []
    for name, size in (("k", archive.types.size_k), ("v", archive.types.size_v)):
        every = np.concatenate([np.zeros((n_layer, n_head, 0, size), np.uint8), *(getattr(chunk, name) for chunk in archive.chunks())], axis=2)
        found.append(np.take_along_axis(every, numbers[..., None], axis=2))
    return Rows(*found)


def lasting(segments: list[SegmentStats]) -> list[SegmentStats]:
    """Without which cells came back from the archive, and how much was written there already: that may differ."""
    return [dataclasses.replace(segment, n_recalled=0.0, n_archived=0) for segment in segments]
