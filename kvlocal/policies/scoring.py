"""Scores of cells as the formulas have them, vectorised over layers and heads. L layers, H KV heads, C cells, the window last."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]


def normalised(values: Scores, window: int, leaving_out: npt.NDArray[np.bool_] | None = None) -> Scores:
    """Values [L, H, C] over the largest of their layer and head before the window, some cells left out; 0 where that is 0."""
    n_before = values.shape[-1] - window
    among = True if leaving_out is None else ~leaving_out[..., :n_before]
    largest = values[..., :n_before].max(axis=-1, keepdims=True, initial=0, where=among)
    return np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)


def pooled(values: Scores, window: int, kernel: int) -> Scores:
    """Values [L, H, C], each cell before the window raised to the largest of the `kernel` cells around it (SnapKV).

    Stride 1; at the ends, the last before the window too, the neighbours that are there. The window takes no part: its cells see themselves
    more than anything else. kernel: odd, 1 for no pooling.
    """
    if kernel == 1:
        return values
    result = values.copy()
    n_before = values.shape[-1] - window
    source, target = values[..., :n_before], result[..., :n_before]
    for distance in range(1, kernel // 2 + 1):
        np.maximum(target[..., distance:], source[..., :-distance], out=target[..., distance:])
        np.maximum(target[..., :-distance], source[..., distance:], out=target[..., :-distance])
    return result


def local_score(attention: Scores, window: int, kernel: int = 1, leaving_out: npt.NDArray[np.bool_] | None = None) -> Scores:
    """local [L, H, C]: the attention of the last queries, pooled, over the largest before the window (G-KV, section Scores)."""
    return normalised(pooled(attention, window, kernel), window, leaving_out)


def global_score(history: Scores, local: Scores, alpha: float) -> Scores:
    """F_t = max(alpha * F_{t-1}, local_t) [L, H, C]; a cell without history (NaN) starts at local_t (G-KV)."""
    return np.fmax(alpha * history, local)


def against_redundancy(score: Scores, redundancy: Scores, window: int, lam: float) -> Scores:
    """sel = lambda * score - (1 - lambda) * R [L, H, C], R the redundancy over the largest of the cells before the window (R-KV, G-KV)."""
    return lam * score - (1 - lam) * normalised(redundancy, window)


def check_weight(name: str, value: float) -> None:
    """Raises ValueError unless the hyper-parameter is between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, not {value}")


def check_kernel(name: str, value: int) -> None:
    """Raises ValueError unless the hyper-parameter is a number of cells with one in the middle."""
    if value < 1 or value % 2 != 1:
        raise ValueError(f"{name} must be an odd number of cells, 1 for no pooling, not {value}")
