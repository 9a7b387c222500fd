"""What an answer looks at: the attention that its queries pay to each segment of the conversation, and the cells that come back for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvlocal.cache.ledger import Ledger
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.layout import Layout

BySegment = npt.NDArray[np.float64]


def _nothing() -> BySegment:
    return np.zeros(0)


@dataclass
class AttentionOfAnswer:
    """Adds up what the choices of cells for one answer saw, by the segments of the ledger.

    Of the choices made while the user's text is read those at its end count: they have seen what was asked, and those before only parts of the text.

    turn_start: the first token of the user's text that is answered, -1 for none
    at: how many tokens there were at the last choice
    attention: [n_segments] to tokens that are not pinned, mean over layers and heads, of all choices together
    pinned: to tokens that are
    recalled: [n_segments] cells that came back from the archive, mean over layers and heads
    recalled_attention: [n_segments] the most that the queries of one choice paid to these cells in one head, their mean
    """

    turn_start: int = -1
    at: int = 0
    attention: BySegment = field(default_factory=_nothing)
    pinned: float = 0.0
    recalled: BySegment = field(default_factory=_nothing)
    recalled_attention: BySegment = field(default_factory=_nothing)

    def add(
        self,
        ledger: Ledger,
        tokens: npt.NDArray[np.int32],
        back: npt.NDArray[np.bool_],
        scores: npt.NDArray[np.float32] | None,
        attention: npt.NDArray[np.float64] | None,
    ) -> None:
        """At a choice.

        tokens: int32 [L, H, n], the tokens that were chosen
        back: bool [L, H, n], which of them come back from the archive
        scores: float32 [L, H, n], what the queries that chose pay to each of them; None if they did not have to be asked
        attention: float64 [n_tokens], what they pay to each token of the conversation, mean over layers and heads; None as before
        """
        start = turn_start(ledger)
        if start != self.turn_start or (ledger.segments[-1].role == "user" and ledger.n_tokens != self.at):
            self.clear()
        self.turn_start, self.at = start, ledger.n_tokens
        n_heads, returned = back.shape[0] * back.shape[1], tokens[back]
        recalled = np.bincount(returned, minlength=ledger.n_tokens) / n_heads
        self.recalled = _padded(self.recalled, len(ledger.segments)) + ledger.sums_per_segment(recalled)
        if scores is None or attention is None:
            return
        pinned, others = divided(ledger, attention)
        self.pinned += pinned
        self.attention = _padded(self.attention, len(ledger.segments)) + others
        n = len(ledger.segments)
        heads = np.broadcast_to(np.arange(n_heads).reshape(*back.shape[:2], 1), back.shape)[back]
        weights = scores[back]
        paid = np.bincount(heads * n + ledger.segment_of_tokens()[returned], weights, n_heads * n).reshape(n_heads, n)
        self.recalled_attention = np.maximum(_padded(self.recalled_attention, n), paid.max(axis=0))

    def clear(self) -> None:
        self.turn_start, self.at, self.pinned = -1, 0, 0.0
        self.attention, self.recalled, self.recalled_attention = _nothing(), _nothing(), _nothing()

    def truncate(self, ledger: Ledger) -> None:
        """The conversation has become shorter: an answer to what is no more was none."""
        if ledger.n_tokens <= self.turn_start:
            self.clear()
        n = len(ledger.segments)
        self.attention, self.recalled, self.recalled_attention = self.attention[:n], self.recalled[:n], self.recalled_attention[:n]


def divided(ledger: Ledger, attention: npt.NDArray[np.floating]) -> tuple[float, BySegment]:
    """The attention to tokens, [n_tokens], as that to pinned ones and that to the others, by segment."""
    n = min(ledger.n_pinned, len(attention))
    others = attention.astype(np.float64)
    others[:n] = 0
    return float(attention[:n].sum()), ledger.sums_per_segment(others)


def turn_start(ledger: Ledger) -> int:
    """The first token of the last text of the user, -1 without one."""
    return next((segment.start for segment in reversed(ledger.segments) if segment.role == "user"), -1)


def of_cells(native: NativeCache, layout: Layout, ledger: Ledger) -> npt.NDArray[np.float64] | None:
    """What the last queries of the last answer pay to each token that the cache still holds, float64 [n_tokens], mean over layers and heads.

    None where none of its queries is recorded.
    """
    answer = next((segment for segment in reversed(ledger.segments) if segment.role == "assistant"), None)
    if answer is None or not layout.n_window:
        return None
    # what came after it, Nexus tokens, has queries too
    after = ledger.n_tokens - answer.end
    n = min(len(native.query_positions()), ledger.n_tokens - answer.start)
    if n <= after:
        return None
    scores = n * native.scores(n_query=n)
    if after:
        scores -= after * native.scores(n_query=after)
    tokens = ledger.tokens[..., : ledger.n_cells]
    return np.bincount(tokens.ravel(), scores[..., : ledger.n_cells].ravel(), ledger.n_tokens) / (layout.n_layer * layout.n_head_kv)


def _padded(values: BySegment, n_segments: int) -> BySegment:
    """With zeros for the segments that have come since."""
    return np.pad(values, (0, n_segments - len(values)))
