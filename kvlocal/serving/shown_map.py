"""ShownMap: what others see of a conversation's cache, also while it is answered in another thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from kvlocal.chat.cache_map import CacheMap

_WATCHED_SECONDS = 3.0  # that somebody who has looked is likely to look again
_INTERVAL_SECONDS = 0.2  # between two maps of an answer
_SHARE = 0.03  # of the time of an answer that may go into maps of it


@dataclass(frozen=True)
class CacheView:
    """A conversation's cache as others see it.

    answering, in_slot: as ConversationInfo has them
    map: None while nothing is known of it, as of a conversation that has not been in a slot yet since the engine began
    """

    answering: bool
    in_slot: bool
    map: CacheMap | None


class ShownMap:
    """The last map of a conversation. The thread that answers makes one now and then while somebody looks, and never waits for anybody; a map does
    not change once it is made.

    settled: after the last answer, None before the first one
    looked_closely: whether that has what the answer looked at, or it is known that nothing is known of it
    """

    def __init__(self) -> None:
        self.settled: CacheMap | None = None
        self.looked_closely = False
        self._passing: CacheMap | None = None
        self._looked_at = self._due = float("-inf")

    def look(self) -> CacheMap | None:
        """The newest there is."""
        self._looked_at = time.monotonic()
        return self._passing or self.settled

    def refresh(self, make: Callable[[], CacheMap]) -> None:
        """While the conversation is worked on: makes one if somebody looks and the last one is old enough."""
        now = time.monotonic()
        if now < self._due or now - self._looked_at > _WATCHED_SECONDS:
            return
        self._passing = make()
        took = time.monotonic() - now
        self._due = now + max(_INTERVAL_SECONDS, took / _SHARE)

    def settle(self, made: CacheMap, *, looked_closely: bool = False) -> None:
        """It is so after an answer."""
        self.settled, self.looked_closely, self._passing = made, looked_closely or made.looked is not None, None

    def end(self) -> None:
        """Nothing is worked on any more; where no answer came the conversation is as it was."""
        self._passing = None
