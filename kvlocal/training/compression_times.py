"""When a conversation would be compressed in a chat, and how many cells are left, from the lengths of its turns alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvlocal import policies
from kvlocal.cache.compression import cells_to_keep
from kvlocal.cache.config import CacheConfig, check_allocation
from kvlocal.training.compressed_reading import Span


@dataclass(frozen=True)
class Timetable:
    """The compressions of one conversation.

    spans: what is read between them
    n_keep: how many cells each layer and head has when a span begins; 0 for the first
    first: the position that the first of these is moved to, all following; None where keys stay where they are
    """

    spans: tuple[Span, ...]
    n_keep: tuple[int, ...]
    first: tuple[int | None, ...]

    @classmethod
    def of(cls, config: CacheConfig, turns: Sequence[tuple[int, bool]], n_pinned: int, n_ctx_train: int, n_swa: int = 0) -> Timetable:
        """As BudgetedCache does it, without an archive and before the end of the trained context.

        Args:
            config: budget, ratio, stride, window, micro-batch and policy.
            turns: of each its tokens, and whether the model writes them, one by one; others are read in micro-batches.
            n_pinned: the first tokens, which always stay; the sinks do at least.
            n_ctx_train: positions that the model was trained for.
            n_swa: size of the sliding window of the layers that are not compressed.

        Raises:
            CacheError: the budget does not go together with the model.
        """
        policy = policies.make(config.policy, config.policy_args)
        budget, capacity, evicts = check_allocation(n_ctx_train, config)
        rotates = config.positions == "cache" or (config.positions == "auto" and policy.rotates)
        n_pinned = max(n_pinned, config.n_sink)
        begin = n_cells = n_tokens = position = 0
        spans, kept, first = [], [0], [None]  # type: list[Span], list[int], list[int | None]

        def is_due() -> bool:
            return evicts and n_cells >= target() + config.stride

        def target() -> int:
            return cells_to_keep(budget, config.ratio, n_pinned, config.window, n_tokens)

        for length, written in turns:
            left = length
            while left:
                n = 1 if written else min(left, config.n_ubatch, max(1, capacity - n_cells))
                left, n_cells, n_tokens = left - n, n_cells + n, n_tokens + n
                if is_due():
                    n_cells = target()
                    spans.append(Span(begin, n_tokens, position))
                    position += n_tokens - begin
                    begin = n_tokens
                    kept.append(n_cells)
                    first.append(max(0, n_swa + 1 - n_cells) if rotates else None)
                    if rotates:
                        position = max(0, n_swa + 1 - n_cells) + n_cells
        if begin < n_tokens:
            spans.append(Span(begin, n_tokens, position))
        return cls(tuple(spans), tuple(kept[: len(spans)]), tuple(first[: len(spans)]))
