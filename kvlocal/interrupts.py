"""Keeps Ctrl-C away from what must not be torn."""

import signal
import threading
from typing import Self


class CtrlCWaits:
    """A context manager inside which Ctrl-C has no effect yet: it has it on leaving.

    It matters in the main thread alone, where signals are handled.
    """

    def __enter__(self) -> Self:
        self._interrupted, self._handler = False, None
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._interrupted:
                signal.raise_signal(signal.SIGINT)

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
