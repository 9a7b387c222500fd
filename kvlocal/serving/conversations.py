"""Conversations: all that an engine keeps, and which of them a request goes on with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvlocal.serving.chain import n_common, n_overlap
from kvlocal.serving.conversation import KeptConversation


class Found(NamedTuple):
    """A conversation that has what a history begins with.

    n_kept, n_given: so many turns of the conversation are the first so many of the history; they differ where the history was trimmed
    """

    conversation: KeptConversation
    n_kept: int
    n_given: int

    @property
    def goes_on(self) -> bool:
        """Whether nothing of the conversation is left out, so that what follows belongs to it."""
        return self.n_kept == len(self.conversation.turns)


class Conversations:
    """The conversations of all owners; safe to use from any thread.

    ram: bytes that idle conversations may take in memory, the oldest leave it first
    disk: bytes that all of them may take on the disk, the oldest are deleted first

    lock: guards it and what its conversations say of themselves
    released: notified when a conversation is idle again
    """

    def __init__(self, ram: int, disk: int) -> None:
        self._ram, self._disk = ram, disk
        self.lock = threading.RLock()
        self.released = threading.Condition(self.lock)
        self._by_id: dict[str, KeptConversation] = {}

    def __iter__(self) -> Iterator[KeptConversation]:
        with self.lock:
            return iter(list(self._by_id.values()))

    def get(self, identity: str, owner: str) -> KeptConversation | None:
        """One that this owner may see."""
        with self.lock:
            found = self._by_id.get(identity)
            return found if found and found.owner == owner else None

    def add(self, conversation: KeptConversation) -> None:
        """It can be found from now on."""
        with self.lock:
            self._by_id[conversation.id] = conversation

    def remove(self, conversation: KeptConversation) -> None:
        """Nobody finds it any more."""
        with self.lock:
            conversation.deleted = True
            self._by_id.pop(conversation.id, None)

    def find(self, chain: Sequence[str], owner: str, preferred: str | None = None) -> Found | None:
        """The preferred one if the history goes on with it; else the one with the longest common beginning that there is something of to go on from,
        that of which nothing is left out before others, an idle one before one that is answering, and one in memory before one on the disk. What
        stands before the first turn is a beginning, too."""
        best: tuple[tuple[bool, int, bool, bool, bool, float], Found] | None = None
        with self.lock:
            for one in self._by_id.values():
                n = n_common(one.chain, chain) if one.owner == owner else -1
                in_memory = one.captured is not None or (one.live is not None and one.answering is None)
                on_disk = one.record is not None and one.answering is None and n > 0
                if n < 0 or not (in_memory or on_disk):
                    continue
                found = Found(one, n, n)
                goes_on = found.goes_on and one.answering is None
                rank = (goes_on and n > 0 and one.id == preferred, n, goes_on, one.answering is None, in_memory, one.last_used)
                if best is None or rank > best[0]:
                    best = rank, found
        return best[1] if best else None

    def find_source(self, chain: Sequence[str], owner: str) -> Found | None:
        """The one from which most of these turns need not be read again; one in memory before one on the disk. It need not be the one that the turns
        belong to: a server that was killed may have left that without what to go on from."""
        best: tuple[tuple[int, bool, float], Found] | None = None
        with self.lock:
            for one in self._by_id.values():
                n = n_common(one.chain, chain) if one.owner == owner else -1
                ready = one.n_ready(n) if n >= 0 else None
                if ready is None:
                    continue
                rank = (ready, one.captured is not None, one.last_used)
                if best is None or rank > best[0]:
                    best = rank, Found(one, n, n)
        return best[1] if best else None

    def find_trimmed(self, root: str, digests: Sequence[str], owner: str) -> Found | None:
        """The idle one whose last turns are the first of a history that lacks those before; the longest of them.

        root: the beginning of a chain
        digests: of the turns (kvlocal.serving.chain.turn_digest)
        """
        with self.lock:
            idle = [one for one in self._by_id.values() if one.owner == owner and one.chain[0] == root and one.answering is None]
            overlaps = [Found(one, len(one.turns), n) for one in idle if (n := n_overlap(one.turn_digests, digests))]
            return max(overlaps, key=lambda found: (found.n_given, found.conversation.last_used), default=None)

    def next_to_leave_slot(self) -> KeptConversation | None:
        """Of the idle ones in slots the one that is least likely to go on."""
        with self.lock:
            idle = [one for one in self._by_id.values() if one.live and one.answering is None]
            return min(idle, key=lambda one: (not one.is_aside, one.last_used), default=None)

    def bound_memory(self) -> None:
        """The oldest idle ones that are not in slots leave memory until the rest is small enough; those that the disk has not got are gone."""
        with self.lock:
            idle = sorted((one for one in self._by_id.values() if one.captured and one.live is None and one.answering is None), key=_last_used)
            total, counts = self._memory()
            for one in idle:
                if total <= self._ram:
                    return
                if one.record and one.written is not one.captured:
                    continue
                total -= _release(one, counts)
                one.captured = None
                if not one.record:
                    self.remove(one)

    def beyond_disk(self) -> list[KeptConversation]:
        """The oldest idle ones that are to be deleted for the rest to be small enough; nobody finds them any more."""
        with self.lock:
            kept = sorted((one for one in self._by_id.values() if one.record), key=_last_used)
            sizes = {one.id: one.record.n_bytes() for one in kept if one.record}
            total, gone = sum(sizes.values()), []
            for one in kept:
                if total > self._disk and one.live is None and one.answering is None:
                    total -= sizes[one.id]
                    self.remove(one)
                    gone.append(one)
            return gone

    def bytes_in_memory(self) -> int:
        """What all of them take in memory besides cells; what is shared counts once."""
        with self.lock:
            return self._memory()[0]

    def _memory(self) -> tuple[int, dict[int, int]]:
        """What they take, and how many have each part, by its key."""
        total = 0
        counts: dict[int, int] = {}
        for one in self._by_id.values():
            if captured := one.captured:
                total += captured.n_bytes
                for part in captured.parts:
                    total += 0 if part.key in counts else part.data.nbytes
                    counts[part.key] = counts.get(part.key, 0) + 1
        return total, counts


def _release(conversation: KeptConversation, counts: dict[int, int]) -> int:
    """How many bytes become free when a conversation leaves memory."""
    captured = conversation.captured
    assert captured is not None
    n_bytes = captured.n_bytes
    for part in captured.parts:
        counts[part.key] -= 1
        n_bytes += 0 if counts[part.key] else part.data.nbytes
    return n_bytes


_last_used: Callable[[KeptConversation], float] = lambda conversation: conversation.last_used  # noqa: E731
