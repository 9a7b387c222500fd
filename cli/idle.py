"""What a chat does while the person types: Nexus tokens behind the answer, a snapshot, and the second read of finished turns."""

import threading
from collections.abc import Callable
from typing import Self

from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError


class Idle:
    """A context manager in which a session finishes its last turn, is kept and reads turns again, in a thread, until the block is left.

    A failure costs only scores, so it waits for the next call of the session, which meets it again if it is serious.

    Args:
        session: the session.
        keep: writes the snapshot, and asks its argument whether to stop.
    """

    def __init__(self, session: ChatSession, keep: Callable[[Callable[[], bool]], None]) -> None:
        self._session, self._keep, self._stop = session, keep, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            self._session.finish_turn()
            self._keep(self._stop.is_set)
            self._session.second_read(self._stop.is_set)
        except KvlocalError:
            pass

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
