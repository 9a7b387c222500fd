"""Answering: one request on its way through an engine, as those who wait for it see it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from kvlocal.serving.request import AnswerRequest, Event, Finished, TextRequest


class Answering:
    """The events of a request: pieces of the answer as they come, and Finished at the end.

    Everything here may be called from any thread.

    request: what was asked
    """

    def __init__(self, request: AnswerRequest | TextRequest, leave_queue: Callable[[Answering], None] = lambda answering: None) -> None:
        self.request = request
        self._leave_queue = leave_queue
        # again by a listener that cancels
        self._lock = threading.RLock()
        self._past: list[Event] = []
        self._listener: Callable[[Event], None] | None = None
        self._place: tuple[str, int] | None = None
        self._place_listener: Callable[[str, int], None] = lambda conversation, n_messages: None
        self._stop: Callable[[], None] = lambda: None
        self._cancelled = False

    def on_event(self, listener: Callable[[Event], None]) -> None:
        """Calls a function with each event, those that came already among them, in order. There is one listener.

        It is called in the thread that computes, so it must not wait for anything: in a program with asyncio it is
        `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`.
        """
        with self._lock:
            if self._listener is not None:
                raise ValueError("somebody listens already")
            self._listener = listener
            past, self._past = self._past, []
            for event in past:
                listener(event)

    def on_place(self, listener: Callable[[str, int], None]) -> None:
        """Calls a function once, as soon as it is known where the answer will be: in which conversation, and how many messages that has then, as
        Finished says it. It is called before any event, in the thread that works on the request."""
        with self._lock:
            self._place_listener = listener
            if self._place is not None:
                listener(*self._place)

    def events(self) -> Iterator[Event]:
        """Waits for each event and yields it; the last one is Finished. Closing the iterator before that cancels the request."""
        queue: SimpleQueue[Event] = SimpleQueue()
        self.on_event(queue.put)
        return self._events(queue)

    def _events(self, queue: SimpleQueue[Event]) -> Iterator[Event]:
        try:
            while True:
                event = queue.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends the answer after its current token, or the reading of the prompt after its current micro-batch. What there is of the answer stays in
        the conversation, and Finished comes all the same. Afterwards it has no effect."""
        with self._lock:
            self._cancelled, stop = True, self._stop
        stop()
        self._leave_queue(self)

    # for the engine

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._cancelled

    def can_stop(self, stop: Callable[[], None]) -> None:
        """What ends the answer that is drawn from now on; it is called at once if the request was cancelled."""
        with self._lock:
            self._stop, cancelled = stop, self._cancelled
        if cancelled:
            stop()

    def put(self, conversation: str, n_messages: int) -> None:
        """Where the answer will be."""
        with self._lock:
            if self._place is None:
                self._place = conversation, n_messages
                self._place_listener(conversation, n_messages)

    def emit(self, event: Event) -> None:
        """Passes an event on. What the listener raises is lost: it concerns no one else."""
        with self._lock:
            if isinstance(event, Finished):
                # of a request that ended before it had a place
                self.put(event.conversation, event.n_messages)
            if self._listener is None:
                self._past.append(event)
            else:
                self._listener(event)
