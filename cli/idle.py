"""What a chat does while the person types: Nexus tokens behind the answer, a snapshot, and the second read of finished turns."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.interrupts import CtrlCWaits


class Idle:
    """Finishes the last turn of a session, keeps it and reads turns again, in a thread; the one owner of all such threads of a chat, of which there
    is one at a time.

    A KvlocalError there costs only scores, so it waits for the next call of the session, which meets it again if it is serious.

    Args:
        keep: writes the snapshot, and asks its argument whether to stop.

    Attributes:
        problem: what else went wrong in a thread, "" for nothing.
    """

    def __init__(self, keep: Callable[[Callable[[], bool]], None]) -> None:
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.problem = ""

    def _work(self, session: ChatSession, stop: Callable[[], bool]) -> None:
        try:
            session.finish_turn()
            self._keep(stop)
            session.second_read(stop)
        except KvlocalError:
            pass
        except Exception as error:  # noqa: BLE001 - a thread has nobody else to tell
            self.problem = f"what is done while you type has failed ({type(error).__name__}: {error})"

    @contextmanager
    def working(self, session: ChatSession) -> Iterator[None]:
        """The thread works until the block is left."""
        # Ctrl-C may have come before the last one was waited for
        self.end()
        with CtrlCWaits():
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._work, args=(session, self._stop.is_set), daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        """Stops the thread, if there is one, and waits for it. Ctrl-C has its effect after that."""
        with CtrlCWaits():
            if self._thread is not None:
                self._stop.set()
                self._thread.join()
                self._thread = None
