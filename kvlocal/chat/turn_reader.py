"""TurnReader: brings the text of turns into a cache, with the markup around it and Nexus tokens behind it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from kvlocal.cache.budgeted import BudgetedCache, Passage, Progress
from kvlocal.nexus.allotment import n_nexus
from kvlocal.nexus.tokens import LONG_TEXT, NexusTokens
from kvlocal.policies.nexus import Allotment
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.pieces import Piece


class TurnReader:
    """Reads what a template gives, each piece into a segment of its role.

    cache: where it goes
    template: of the cache's model
    nexus: Nexus tokens, None for none
    progress: called with (tokens done, tokens in all) while a long text is read
    """

    def __init__(self, cache: BudgetedCache, template: ChatTemplate, nexus: NexusTokens | None, progress: Progress | None) -> None:
        self.cache, self.template, self.nexus = cache, template, nexus
        self._progress = progress

    @property
    def end_tokens(self) -> Collection[int]:
        """Those that end an answer."""
        return self.template.end_tokens

    def passages(self, pieces: Sequence[Piece]) -> list[Passage]:
        """The tokens of pieces."""
        tokens = self.template.tokens(self.cache.model, pieces)
        return [
            Passage(piece.role, ids, piece.text if piece.kind == "content" else "") for piece, (_, ids) in zip(pieces, tokens, strict=True)
        ]

    def read(self, pieces: Sequence[Piece]) -> int:
        """Evaluates pieces; returns the number of tokens."""
        passages = self.passages(pieces)
        if self.ends_with("nexus"):
            # the end of the last answer was read before its Nexus tokens
            passages = passages[next(i for i, piece in enumerate(pieces) if piece.role != "assistant") :]
        return self._evaluate(passages)

    def ends_with(self, role: str) -> bool:
        """Whether the last segment is of that role."""
        segments = self.cache.ledger.segments
        return bool(segments) and segments[-1].role == role

    def finish_answer(self, pieces: Sequence[Piece]) -> None:
        """Evaluates what ends an answer, and Nexus tokens behind it."""
        self._evaluate(self.passages(pieces))
        self._read_nexus()

    def _read_nexus(self) -> None:
        """Reads Nexus tokens for what came since the last ones: a user's turn and the answer to it, or a block of a long text."""
        ledger, policy, ratio = self.cache.ledger, self.cache.policy, self.cache.config.ratio
        assert self.nexus is not None and isinstance(policy, Allotment)
        start = max((segment.end for segment in ledger.segments if segment.role in ("system", "nexus")), default=0)
        k = n_nexus(ledger.n_tokens - start, policy.compression if ratio is None else ratio, policy.share, self.nexus.file.k)
        self.cache.append_vectors(self.nexus.vectors(k), "nexus", self.nexus.adapter)

    def _evaluate(self, passages: Sequence[Passage]) -> int:
        """Evaluates passages, with Nexus tokens where a long text is divided; returns how many tokens they have."""
        total, done = sum(len(passage.tokens) for passage in passages), 0

        def progress(n: int, _: int) -> None:
            if self._progress and total > self.cache.context.n_ubatch:
                self._progress(done + n, total)

        first, *others = self._stretches(passages) if self.nexus else [passages]
        done += self.cache.read(first, progress)
        for stretch in others:
            self._read_nexus()
            done += self.cache.read(stretch, progress)
        return total

    def _stretches(self, passages: Sequence[Passage]) -> list[list[Passage]]:
        """The passages, divided where Nexus tokens come: at ends of blocks in texts of the user that are long."""
        stretches: list[list[Passage]] = [[]]
        for passage in passages:
            blocks = [passage.tokens]
            if passage.role == "user" and len(passage.tokens) > LONG_TEXT.max_block:
                ends = LONG_TEXT.split([self.cache.model.token_bytes(token) for token in passage.tokens.tolist()], None)
                blocks = np.split(passage.tokens, ends[:-1])
            stretches[-1].append(passage._replace(tokens=blocks[0]))
            stretches += [[passage._replace(tokens=block)] for block in blocks[1:]]
        return stretches
