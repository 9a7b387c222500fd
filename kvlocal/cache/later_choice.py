"""LaterChoice: a choice of cells that is found in a thread of its own, while the context decodes the tokens before which it takes effect."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvlocal.cache.recall import ChosenTokens


class LaterChoice:
    """At most one choice that is being found. When it takes effect is a matter of tokens, not of time, so that the same text has the same answer."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._found: Future[ChosenTokens] | None = None
        self._begun_at = 0

    def begin(self, n_tokens: int, find: Callable[[], ChosenTokens]) -> None:
        """Begins with it, when the conversation has so many tokens; one that was not taken is dropped."""
        self.drop()
        self._pool = self._pool or ThreadPoolExecutor(1, "kvlocal-choice")
        self._found, self._begun_at = self._pool.submit(find), n_tokens

    def age(self, n_tokens: int) -> int | None:
        """How many tokens have come since it was begun with; None without one."""
        return None if self._found is None else n_tokens - self._begun_at

    def take(self) -> ChosenTokens:
        """Waits for it; whatever made it fail is raised. There must be one, and is none then."""
        assert self._found is not None
        wait([self._found])
        found, self._found = self._found, None
        return found.result()

    def drop(self) -> None:
        """Waits until nothing is looked through any more, and forgets the choice."""
        if self._found is not None:
            wait([self._found])
            self._found = None

    def close(self) -> None:
        """Ends the thread."""
        self.drop()
        if self._pool:
            self._pool.shutdown()
            self._pool = None
