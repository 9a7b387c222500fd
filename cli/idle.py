"""What a chat does while the person types: Nexus tokens behind the answer, and the second read of finished turns."""

import threading
from typing import Self

from kvlocal.errors import KvlocalError
from kvlocal.session import ChatSession


class Idle:
    """A context manager in which a session finishes its last turn and reads turns again, in a thread, until the block is left.

    A failure costs only scores, so it waits for the next call of the session, which meets it again if it is serious.
    """

    def __init__(self, session: ChatSession) -> None:
        self._session, self._stop = session, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            self._session.finish_turn()
            self._session.second_read(self._stop.is_set)
        except KvlocalError:
            pass

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
