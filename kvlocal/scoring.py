"""Scores of cells as the formulas have them, vectorised over layers and heads. L layers, H KV heads, C cells, the window last."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]


def normalised(values: Scores, window: int) -> Scores:
    """Values [L, H, C] over the largest of their layer and head before the window; 0 where that is 0."""
    largest = values[..., : values.shape[-1] - window].max(axis=-1, keepdims=True, initial=0)
    return np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)


def local_score(attention: Scores, window: int) -> Scores:
    """local [L, H, C]: the attention of the last queries over the largest of the cells before the window (G-KV, section Scores)."""
    return normalised(attention, window)


def global_score(history: Scores, local: Scores, alpha: float) -> Scores:
    """F_t = max(alpha * F_{t-1}, local_t) [L, H, C]; a cell without history (NaN) starts at local_t (G-KV)."""
    return np.fmax(alpha * history, local)
