"""What the tests of archives and of recall from them have in common."""

import dataclasses

import numpy as np

from kvlocal.cache.archive import Archive
from kvlocal.cache.config import CacheConfig
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.chat.stats import SegmentStats
from kvlocal.llama.model import Model
from kvlocal.llama.rows import Rows
from kvlocal.llama.sampling import SamplingParams

# one thread: two that wait for each other crawl when the machine is busy
CONFIG = CacheConfig(budget=96, policy="recall", stride=32, n_ubatch=64, n_threads=1, archive="ram")
# on a device too
AT_ONCE = dataclasses.replace(CONFIG, policy_args={"late": 0})
CHAT = SessionConfig(**vars(CONFIG), max_tokens=24, sampling=SamplingParams(temperature=0))
STORY = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. "


def session(model: Model, **changes: object) -> ChatSession:
    """One with CHAT, and some of it otherwise."""
    return ChatSession(model, dataclasses.replace(CHAT, **changes))


def ask(chat: ChatSession, texts: list[str]) -> list[str]:
    """The answers."""
    return ["".join(chat.send(text)) for text in texts]


def state(chat: ChatSession) -> dict[str, object]:
    """All that what comes next depends on, but for what is archived."""
    cache = chat.cache
    n, ledger = cache.ledger.n_cells, cache.ledger
    rows = cache.native.read_rows(np.arange(n))
    queries = (cache.native.read_queries(1), cache.native.query_positions()) if cache.layout.n_window else (np.zeros(0), np.zeros(0))
    return {
        "ids": ledger.ids, "tokens": ledger.tokens[..., :n], "positions": ledger.positions[..., :n], "next": ledger.next_position,
        "cells": cache.native.positions(), "k": rows.k, "v": rows.v, "queries": queries[0], "at": queries[1],
        "pace": cache.pace, "recent": list(chat._sampler.recent), "marks": cache.marked,
    }  # fmt: skip


def read_nothing_again(chat: ChatSession) -> None:
    """From now on it fails where the conversation would be read again."""
    chat._begin = chat.restore = chat.cache.begin = None


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
