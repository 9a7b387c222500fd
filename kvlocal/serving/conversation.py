"""KeptConversation: one that an engine keeps, in a slot, in memory or on the disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlocal.conversations.snapshot import Captured
from kvlocal.serving.answering import Answering
from kvlocal.serving.chain import chain, turn_digest
from kvlocal.serving.live import LiveConversation
from kvlocal.serving.record import Record
from kvlocal.serving.request import AnswerRequest
from kvlocal.serving.shown_map import ShownMap
from kvlocal.template.markup import Message

_TITLE = 80  # characters


@dataclass(frozen=True)
class Checkpoint:
    """A conversation as it was after an answer, in the memory of its process.

    system, tools, turns, captured, n_tokens: as KeptConversation has them
    """

    system: str | None
    tools: Sequence[Mapping[str, Any]]
    turns: Sequence[Message]
    captured: Captured | None
    n_tokens: int


@dataclass(eq=False)
class KeptConversation:
    """A conversation that is kept.

    id: of this one alone
    owner: kvlocal.serving.chain.owner_digest of who may see it
    system, tools: what stands before its first turn
    turns: what was said, as the session has it
    record: of it on the disk, None if nothing is kept there
    answering: the request that is worked on in it, None while it is idle
    live: it is in a slot
    shown: its cache, as others see it
    captured: as it was after its last answer; in memory, to go on from
    written: the last one that the disk has
    on_disk: how many turns it can have that is gone on from on the disk (Captured.lengths)
    deleted: nobody is to find it any more
    n_tokens: tokens after its last answer
    last_used: when, in seconds of time.time
    """

    id: str
    owner: str
    system: str | None
    tools: Sequence[Mapping[str, Any]] = ()
    turns: list[Message] = field(default_factory=list)
    record: Record | None = None
    answering: Answering | None = None
    live: LiveConversation | None = None
    shown: ShownMap = field(default_factory=ShownMap)
    captured: Captured | None = None
    written: Captured | None = None
    on_disk: Sequence[int] = ()
    deleted: bool = False
    n_tokens: int = 0
    last_used: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.set_turns(self.turns)

    def set_turns(self, turns: Sequence[Message]) -> None:
        """The conversation is these turns now."""
        self.turns = [dict(turn) for turn in turns]
        self.chain = chain(self.owner, self.system, self.tools, self.turns)
        self.turn_digests = [turn_digest(turn) for turn in self.turns]

    def n_ready(self, n: int) -> int | None:
        """How many of its first n turns need not be read again by a conversation that begins with them; None if there is nothing to begin from."""
        if self.captured:
            return _longest(self.captured.lengths, n)
        if self.record and self.answering is None:
            # to bring in a file for what stands before the first turn is not worth it
            return _longest(self.on_disk, n) or None
        return None

    def touch(self) -> None:
        """It was used just now."""
        self.last_used = time.time()

    @property
    def is_aside(self) -> bool:
        """Whether it is a single question so far, as the ones that programs ask beside a conversation: for a title, say."""
        return len(self.turns) <= 2

    def checkpoint(self) -> Checkpoint:
        """It as it is now."""
        return Checkpoint(self.system, self.tools, [dict(turn) for turn in self.turns], self.captured, self.n_tokens)

    def bytes_in_memory(self) -> int:
        """What it takes besides cells; parts that it shares with others count."""
        captured = self.captured
        if captured is None:
            return 0
        return captured.n_bytes + sum(part.data.nbytes for part in captured.parts)


def _longest(lengths: Sequence[int], n: int) -> int:
    return max((length for length in lengths if length <= n), default=0)


@dataclass(frozen=True)
class ConversationInfo:
    """A conversation as others see it.

    title: how the first text of the user begins
    turns: texts of the user
    tokens: tokens of all of it
    in_slot, answering: whether it is in a slot, and whether a request is worked on in it
    bytes_in_memory, bytes_on_disk: what it takes besides cells; what it shares with others in memory counts for each
    last_used: in seconds since 1970
    """

    id: str
    title: str
    turns: int
    tokens: int
    in_slot: bool
    answering: bool
    bytes_in_memory: int
    bytes_on_disk: int
    last_used: float

    @classmethod
    def of(cls, conversation: KeptConversation) -> ConversationInfo:
        """As it is now."""
        answering = conversation.answering
        # the first message is no turn yet while it is read
        request = answering.request if answering else None
        said = conversation.turns or (request.messages if isinstance(request, AnswerRequest) else ())
        texts = [turn["content"] for turn in said if turn["role"] == "user"]
        title = " ".join(texts[0][: 2 * _TITLE].split())[:_TITLE] if texts else ""
        on_disk = conversation.record.n_bytes() if conversation.record else 0
        in_memory = conversation.bytes_in_memory()
        states = conversation.live is not None, answering is not None
        return cls(conversation.id, title, len(texts), conversation.n_tokens, *states, in_memory, on_disk, conversation.last_used)
