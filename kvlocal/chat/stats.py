"""A conversation in numbers: its cache, its last answer, and what is left of each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.chat.answer_piece import TokenLogprob
from kvlocal.chat.looked_at import turn_numbers

StopReason = Literal["end", "length", "stop", "tool_calls", "stopped"]


@dataclass(frozen=True)
class KvStats:
    """The cache in numbers, in cells of each layer and head.

    budget, used, capacity: what it may hold after a compression, holds, and was allocated for
    peak_cells: the most it ever held
    history_tokens: tokens of the whole conversation
    compressions: how often cells were removed
    evicted: cells removed so far
    next_position: where the next token goes
    nexus: of the cells it holds, those of Nexus tokens, mean over layers and heads
    rotations: how often the keys were moved back to low positions
    archived: tokens in the archive
    archive_bytes: what they take, in memory and on the disk
    recalled: cells that came back from the archive when they were last chosen, mean over layers and heads
    archive_lost: why the archive was given up, "" if it was not
    """

    budget: int
    used: int
    capacity: int
    peak_cells: int
    history_tokens: int
    compressions: int
    evicted: int
    next_position: int
    nexus: float
    rotations: int
    archived: int = 0
    archive_bytes: tuple[int, int] = (0, 0)
    recalled: float = 0.0
    archive_lost: str = ""

    @classmethod
    def of(cls, cache: BudgetedCache) -> KvStats:
        """As they are now."""
        ledger = cache.ledger
        archive = cache.compressor.recaller.archive if cache.compressor.recaller else None
        return cls(
            cache.target,
            ledger.n_cells,
            cache.context.n_cells,
            cache.peak,
            ledger.n_tokens - ledger.n_nexus,
            cache.compressor.compressions,
            ledger.n_tokens - ledger.n_cells,
            ledger.next_position,
            float(ledger.nexus().mean(axis=(0, 1)).sum()) if ledger.n_nexus else 0.0,
            cache.compressor.rotations,
            archive.n_tokens if archive else 0,
            (archive.bytes_in_memory, archive.bytes_on_disk) if archive else (0, 0),
            cache.compressor.n_recalled,
            cache.compressor.lost,
        )

    def report(self) -> dict[str, float]:
        """What is told with a result."""
        return {name: getattr(self, name) for name in REPORTED}


# the numbers of KvStats that are told with a result
REPORTED = ("budget", "peak_cells", "history_tokens", "compressions", "evicted", "nexus")


@dataclass(frozen=True)
class TurnStats:
    """The last answer in numbers.

    stop_reason: "end" by itself, "length" at max_tokens, "stop" at a stop text that was asked for, "tool_calls" by itself after calls of tools,
        "stopped" by the caller
    drawn: its tokens, with the one that ended it
    recalled: turns that cells came back from the archive of for it, as SegmentStats numbers them (kvlocal.chat.looked_at.recalled_turns)
    logprobs: of its tokens, with the one that ended it, if they were asked for
    """

    prompt_tokens: int
    answer_tokens: int
    prompt_seconds: float
    answer_seconds: float
    stop_reason: StopReason
    drawn: Sequence[int]
    recalled: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer, 0 for an empty one."""
        return self.answer_tokens / self.answer_seconds if self.answer_seconds > 0 else 0.0


@dataclass(frozen=True)
class SegmentStats:
    """What is left of one segment.

    turn: 0 for the system prompt; each text of the user begins the next, and its answer belongs to it
    n_tokens: how many there were
    n_cells: how many are in the cache, mean over layers and heads; n_cells_min: the smallest of them
    n_archived: how many are in the archive
    n_recalled: of the cells those whose token had left and came back from the archive, mean over layers and heads
    """

    role: str
    turn: int
    n_tokens: int
    n_cells: float
    n_cells_min: int
    pinned: bool
    text: str
    n_archived: int = 0
    n_recalled: float = 0.0


def segment_stats(cache: BudgetedCache) -> list[SegmentStats]:
    """What is left of each segment, in order."""
    ledger, recaller = cache.ledger, cache.compressor.recaller
    n_archived = recaller.archive.n_tokens if recaller else 0
    counts = ledger.cells_per_segment().reshape(len(ledger.segments), -1)
    columns = counts.mean(axis=1).tolist(), counts.min(axis=1).tolist(), ledger.returned_per_segment().tolist()
    stats = []
    for segment, turn, mean, least, back in zip(ledger.segments, turn_numbers(ledger.segments), *columns, strict=True):
        archived = min(max(n_archived - segment.start, 0), segment.end - segment.start)
        pinned = segment.end <= ledger.n_pinned
        stats.append(SegmentStats(segment.role, turn, segment.end - segment.start, mean, least, pinned, segment.text, archived, back))
    return stats
