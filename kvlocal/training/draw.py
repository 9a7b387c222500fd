"""Draws the next tokens of several sequences at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TOP_P, MIN_P = 0.95, 0.05
_TOP_K = 128


def draw(
    logits: npt.NDArray[np.float32],
    temperature: npt.NDArray[np.float32],
    uniform: npt.NDArray[np.float64],
    top_p: float = TOP_P,
    min_p: float = MIN_P,
) -> npt.NDArray[np.int64]:
    """One token for each row, from its most likely ones: at most 128, as few as reach the probability `top_p` together, and none that is
    less likely than the share `min_p` of the most likely one.

    What a row gives does not depend on the others.

    Args:
        logits: [n, n_vocab].
        temperature: [n], above 0; what the logits of each row are divided by.
        uniform: [n], a random number from 0 to below 1 for each row.
        top_p: above 0 and at most 1.
        min_p: from 0 to 1.

    Returns:
        [n] tokens.
    """
    scaled = logits / temperature[:, None]
    k = min(_TOP_K, scaled.shape[1])
    likely = np.argpartition(scaled, -k, axis=1)[:, -k:]
    values = np.take_along_axis(scaled, likely, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    likely, values = np.take_along_axis(likely, order, axis=1), np.take_along_axis(values, order, axis=1)

    scaled -= values[:, :1]
    total = np.exp(scaled, out=scaled).sum(axis=1, dtype=np.float64)
    p = np.exp((values - values[:, :1]).astype(np.float64)) / total[:, None]
    # each that is needed to reach top_p, the first one always
    p[(np.cumsum(p, axis=1) - p >= top_p) | (p < min_p * p[:, :1])] = 0
    reached = np.cumsum(p, axis=1)
    index = (reached <= uniform[:, None] * reached[:, -1:]).sum(axis=1)
    index = np.minimum(index, np.count_nonzero(p, axis=1) - 1)
    return np.take_along_axis(likely, index[:, None], axis=1)[:, 0]
