"""What the last answer looked at, turn by turn, as a person understands it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvlocal.cache.attention_of_answer import BySegment, divided, of_cells, turn_start
from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.cache.ledger import Ledger, Segment
from kvlocal.chat.config import SessionError

# turns are named to which a head paid this share of its attention, and this share of the most that a head paid to any
_LEAST = 0.05
_LEAST_OF_LARGEST = 0.5


@dataclass(frozen=True)
class PartLookedAt:
    """An earlier text of the user, or the answer to it.

    turn: as SegmentStats numbers it
    share: of the attention to all earlier turns
    recalled: cells of it that came back from the archive for the answer, mean over layers and heads; each as often as it came
    text: how it begins
    """

    turn: int
    role: str
    share: float
    recalled: float
    text: str


@dataclass(frozen=True)
class LookedAt:
    """How the attention of the last answer was divided, mean over layers and heads.

    Beginning, earlier turns and current turn make 1. The beginning is what always stays, the system prompt and the sinks: the first tokens of a
    conversation get much attention whatever they say, so that they count for themselves.

    parts: the earlier turns that got any, the largest share first
    beginning: share of what always stays
    earlier: of the earlier turns together
    current: of the turn that was answered and of the answer itself
    everything: whether attention to the whole conversation counts, at every choice from the archive: by the last queries of the user's text, and of
        the answer every so many tokens; otherwise it is that of the answer's last queries to what the cache still held
    """

    parts: Sequence[PartLookedAt]
    beginning: float
    earlier: float
    current: float
    everything: bool


def turn_numbers(segments: Sequence[Segment]) -> list[int]:
    """The turn that each segment belongs to: 0 for what comes before the first text of the user, which begins turn 1."""
    numbers, turn, before = [], 0, ""
    for segment in segments:
        # Nexus tokens divide a long text
        turn += segment.role == "user" != before
        before = before if segment.role == "nexus" else segment.role
        numbers.append(turn)
    return numbers


def looked_at(cache: BudgetedCache) -> LookedAt:
    """What the last answer in the cache looked at.

    Raises:
        SessionError: its queries are not known.
    """
    if (noted := looked_at_so_far(cache)) is not None:
        return noted
    found = of_cells(cache.native, cache.layout, cache.ledger)
    if found is None:
        raise SessionError(
            "what the last answer looked at is not known any more: send something first"
            if cache.layout.n_window
            else f"the policy {cache.config.policy} does not look at attention, so that nothing is known of it: choose another policy"
        )
    pinned, attention = divided(cache.ledger, found)
    return _by_parts(cache.ledger, pinned, attention, np.zeros(len(attention)), everything=False)


def looked_at_so_far(cache: BudgetedCache) -> LookedAt | None:
    """The same of an answer that may still be coming, by what the choices of cells for it saw, without computing anything; None without one."""
    noted = cache.compressor.looked
    if noted.turn_start != turn_start(cache.ledger) or not len(noted.attention):
        return None
    return _by_parts(cache.ledger, noted.pinned, noted.attention, noted.recalled, everything=True)


def _by_parts(ledger: Ledger, pinned: float, attention: BySegment, recalled: BySegment, *, everything: bool) -> LookedAt:
    numbers = turn_numbers(ledger.segments)[: len(attention)]
    is_earlier = np.array(numbers) < numbers[-1]
    earlier, current = float(attention[is_earlier].sum()), float(attention[~is_earlier].sum())
    parts: dict[tuple[int, str], PartLookedAt] = {}
    for i in np.flatnonzero(is_earlier & (attention > 0)).tolist():
        segment = ledger.segments[i]
        key = numbers[i], segment.role
        share, back, text = float(attention[i]) / earlier, float(recalled[i]), segment.text
        if before := parts.get(key):
            share, back, text = before.share + share, before.recalled + back, before.text
        parts[key] = PartLookedAt(*key, share, back, text)
    total = (pinned + earlier + current) or 1.0
    ordered = sorted(parts.values(), key=lambda part: -part.share)
    return LookedAt(ordered, pinned / total, earlier / total, current / total, everything)


def recalled_turns(cache: BudgetedCache) -> list[int]:
    """The turns that were recalled for the last answer, ascending.

    A turn counts by the head that paid most to what came back of it: the heads that look far are few, and in a mean over all of them whatever left
    last would win. It is named if that is a twentieth of the head's attention, and half of what the turn got that got most.
    """
    ledger, noted = cache.ledger, cache.compressor.looked
    if noted.turn_start != turn_start(ledger):
        return []
    paid = noted.recalled_attention
    numbers = np.array(turn_numbers(ledger.segments)[: len(paid)], np.int64)
    return np.unique(numbers[paid >= max(_LEAST, _LEAST_OF_LARGEST * paid.max(initial=0))]).tolist()
