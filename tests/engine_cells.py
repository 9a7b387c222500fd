"""What an engine has in its cells while it reads a conversation, for what is computed over the same cells elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.cache.config import CacheConfig
from kvlocal.llama.adapter import Lora
from kvlocal.llama.model import Model


@dataclass
class EngineReading:
    """One conversation as the engine read it.

    logits: float32 [T, n_vocab]
    begins, positions_of_begin: of each compression, how many tokens were read before it, and the position at which it went on
    tokens, positions: the ledger's behind each compression, int32 [L, H_kv, n]
    """

    logits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    begins: list[int] = field(default_factory=list)
    positions_of_begin: list[int] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(
        cls, path: Path, config: CacheConfig, turns: Sequence[tuple[np.ndarray, bool]], n_pinned: int, lora: Path | None = None
    ) -> "EngineReading":
        """Reads turns: of each its tokens int32 [n], and whether the model writes them, one by one."""
        found, rows = cls(), []
        with Model(path, lora=[Lora(lora)] if lora else []) as model, BudgetedCache(model, config, n_outputs=config.n_ubatch) as cache:
            cache.begin(n_pinned)
            for tokens, written in turns:
                cache.ledger.begin_segment("assistant" if written else "user")
                while len(tokens):
                    chunk, tokens = np.split(tokens, [1 if written else cache.room])
                    n = cache.compressor.compressions
                    cache.append(chunk, logits="all")
                    rows.append(cache.context.logits_all())
                    if cache.compressor.compressions > n:
                        found._note(cache)
        found.logits = np.concatenate(rows)
        return found

    def _note(self, cache: BudgetedCache) -> None:
        ledger = cache.ledger
        self.begins.append(ledger.n_tokens)
        self.positions_of_begin.append(ledger.next_position)
        self.tokens.append(ledger.tokens[..., : ledger.n_cells].copy())
        self.positions.append(ledger.positions[..., : ledger.n_cells].copy())
