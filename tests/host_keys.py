"""Scores of keys in host memory by the queries that a cache recorded last."""

from typing import Any

import numpy as np

from kvlocal.llama.cells import NativeCache


def row_scores(native: NativeCache, chunks: list[np.ndarray], n_rows: int, n_query: int = 0, stretches: Any = None, **options: Any) -> np.ndarray:
    """HostQueries.row_scores, with queries that are copied for these stretches."""
    return native.copy_queries(n_query, stretches=stretches).row_scores(chunks, n_rows, **options)


def best_rows(
    native: NativeCache, chunks: list[np.ndarray], boxes: list[np.ndarray], n_rows: int, n_query: int = 0, every: int = 1, stretches: Any = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """HostQueries.best_rows, likewise."""
    return native.copy_queries(n_query, every=every, stretches=stretches).best_rows(chunks, boxes, n_rows, **options)
