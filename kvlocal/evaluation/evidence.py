"""Evidence survival: how much of what an answer rests on was in the cache when it was given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvlocal.cache.ledger import NEXUS, Ledger
from kvlocal.evaluation.memory_chats import Evidence
from kvlocal.llama.model import Model


def evidence_tokens(model: Model, turns: Sequence[npt.NDArray[np.int32]], evidence: Sequence[Evidence]) -> npt.NDArray[np.intp]:
    """The tokens of the texts, counted over the whole conversation: int [n] ascending, a token that holds a part of a text with the others.

    turns: the tokens of what comes before the first message, and of each message (kvlocal.evaluation.history.turn_tokens)
    """
    starts = np.cumsum([0, *map(len, turns)])
    found = [np.zeros(0, np.intp)]
    for piece in evidence:
        parts = [model.token_bytes(token) for token in turns[piece.message + 1].tolist()]
        text, ends = piece.text.encode("utf-8", "replace"), np.cumsum([len(part) for part in parts])
        at = b"".join(parts).find(text)
        # a vocabulary that cannot spell it: the whole message
        first, last = (0, len(parts)) if at < 0 else (np.searchsorted(ends, at, "right"), np.searchsorted(ends, at + len(text)) + 1)
        found.append(starts[piece.message + 1] + np.arange(first, last))
    return np.unique(np.concatenate(found))


def in_cache(ledger: Ledger, tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Which heads hold which tokens now, bool [L, H, n].

    tokens: int [n], counted over the text of the conversation, Nexus tokens left out
    """
    held = np.zeros((*ledger.tokens.shape[:2], ledger.n_tokens), np.bool_)
    np.put_along_axis(held, ledger.tokens[..., : ledger.n_cells], True, axis=-1)
    return held[..., np.flatnonzero(ledger.ids != NEXUS)[tokens]]


def survival(weights: npt.NDArray[np.float32], held: npt.NDArray[np.bool_]) -> float:
    """The share of the evidence's attention that was in the cache, 0 to 1.

    The attention is that of the answer when nothing is removed: a head that does not look at a token of the evidence loses nothing with it. The
    cache is that of the policy, when question and generation prompt were read and the answer began. So it asks whether the cache had what the
    answer needs, not whether the model made an answer of it.

    Args:
        weights: float32 [L, H, n], attention of the answer's queries to each token of the evidence in a reading in which nothing was removed.
        held: bool [L, H, n], whether the head held the token in the reading that is measured.
    """
    total = weights.sum(dtype=np.float64)
    return float(weights.sum(where=held, dtype=np.float64) / total) if total else float(held.mean())
