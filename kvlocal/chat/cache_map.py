"""CacheMap: a conversation and its cache as a picture has them, text by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.chat.config import SessionError
from kvlocal.chat.looked_at import LookedAt, looked_at, looked_at_so_far
from kvlocal.chat.stats import KvStats, SegmentStats, segment_stats


@dataclass(frozen=True)
class MappedPart:
    """What is before the first turn, a text of the user, an answer, or the Nexus tokens behind it.

    role, turn: as SegmentStats has them
    text: how it begins
    tokens: how many it has
    cached: of these in the cache, mean over layers and heads
    archived: of these in the archive
    recalled: of those in the cache the ones that came back from the archive, mean over layers and heads
    pinned: it always stays
    attention: share of the last answer's attention, None where it is not known
    """

    role: str
    turn: int
    text: str
    tokens: int
    cached: float
    archived: int
    recalled: float
    pinned: bool
    attention: float | None = None


@dataclass(frozen=True)
class CacheMap:
    """Where the texts of a conversation are.

    parts: in their order
    kv: the cache in numbers
    looked: what the last answer looked at, or the one that is coming; None where it is not known
    """

    parts: Sequence[MappedPart]
    kv: KvStats
    looked: LookedAt | None = None

    @classmethod
    def of(cls, cache: BudgetedCache, *, closely: bool = False) -> CacheMap:
        """As it is now, also in the middle of an answer.

        closely: it may be computed what a finished answer looked at, where that was not noted
        """
        looked = looked_at_so_far(cache)
        if looked is None and closely:
            try:
                looked = looked_at(cache)
            except SessionError:
                looked = None
        return cls(_parts(segment_stats(cache), looked), KvStats.of(cache), looked)


def _parts(segments: Sequence[SegmentStats], looked: LookedAt | None) -> list[MappedPart]:
    """A text may be of several segments, as markup is around it."""
    shares = {(part.turn, part.role): part.share * looked.earlier for part in looked.parts} if looked else {}
    together: dict[tuple[int, str], list[SegmentStats]] = {}
    for segment in segments:
        together.setdefault((segment.turn, segment.role), []).append(segment)
    current = segments[-1].turn if segments else 0
    parts = []
    for (turn, role), each in together.items():
        # of this turn only the sum is known
        share = None if looked is None or turn in (0, current) else shares.get((turn, role), 0.0)
        parts.append(
            MappedPart(
                role,
                turn,
                next((segment.text for segment in each if segment.text), ""),
                sum(segment.n_tokens for segment in each),
                sum(segment.n_cells for segment in each),
                sum(segment.n_archived for segment in each),
                sum(segment.n_recalled for segment in each),
                all(segment.pinned for segment in each),
                share,
            )
        )
    return parts
