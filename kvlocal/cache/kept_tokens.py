"""KeptTokens: a record of which tokens the cells of a conversation held while each of its tokens was evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvlocal.cache.ledger import Ledger


@dataclass(frozen=True)
class Change:
    """What was left in the cells by one compression.

    n_tokens: the conversation had so many tokens then; the next one is the first that sees these cells
    tokens: int32 [L, H, n_cells], the token in each cell of each compressible layer and KV head, ascending
    """

    n_tokens: int
    tokens: npt.NDArray[np.int32]


@dataclass
class KeptTokens:
    """Notes every change of what is in the cells, besides tokens that are appended; to be given to Compressor.observe.

    What it says is exact where every token is evaluated once and keeps its position: without an archive, with "original" positions.

    changes: in their order
    """

    changes: list[Change] = field(default_factory=list)

    def __call__(self, ledger: Ledger) -> None:
        """The cells were changed to what the ledger says now."""
        self.changes.append(Change(ledger.n_tokens, ledger.tokens[..., : ledger.n_cells].copy()))

    def copy(self) -> KeptTokens:
        """A record that goes on from here on its own."""
        return KeptTokens(list(self.changes))


def seen(changes: Sequence[Change], start: int, end: int, n_layer: int, n_head_kv: int) -> npt.NDArray[np.bool_]:
    """What the tokens start .. end - 1 of a conversation saw while they were evaluated: bool [L, H, end - start, end], one column for each token.

    A token sees the cells that the last compression before it left, the tokens that came since, and itself.
    """
    visible = np.zeros((n_layer, n_head_kv, end - start, end), np.bool_)
    rows = np.arange(start, end)
    layers, heads = np.ogrid[:n_layer, :n_head_kv]
    # from where to where each change holds, and before the first one all is there
    bounds = [0, *(change.n_tokens for change in changes), end]
    for change, first, stop in zip([None, *changes], bounds, bounds[1:], strict=False):
        here = rows[(rows >= first) & (rows < stop)]
        if not len(here):
            continue
        kept = np.zeros((n_layer, n_head_kv, end), np.bool_)
        if change is not None:
            kept[layers[..., None], heads[..., None], change.tokens] = True
        came = np.arange(end)
        since = (came >= first) & (came <= here[:, None])
        visible[:, :, here - start] = kept[:, :, None] | since
    return visible
