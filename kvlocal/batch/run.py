"""Answers a file of conversations: one JSON object a line in, one a line out; several of them decode together."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from typing import Any

from kvlocal.batch.in_process import InProcess
from kvlocal.batch.line import Outcome
from kvlocal.batch.workplace import Taken, Workplace
from kvlocal.chat.config import SessionConfig
from kvlocal.files.text import is_blank
from kvlocal.llama.model import Model
from kvlocal.llama.scheduler import Stopped
from kvlocal.nexus.tokens import NexusTokens

# so many finished results wait at most for the one that comes before them
HELD_BACK = 64

_POLL_SECONDS = 0.1  # between two polls while nothing happens


def run_batch(
    lines: Iterable[bytes],
    model: Model,
    config: SessionConfig,
    *,
    parallel: int = 1,
    ordered: bool = False,
    wanted: Callable[[int, bytes], bool] = lambda number, line: True,
    poll: Callable[[], None] = lambda: None,
    nexus: NexusTokens | None = None,
) -> Generator[Outcome, None, None]:
    """Completes each conversation and yields what became of it; blank lines are skipped. The iterator is to be closed before the model.

    Each has a session of its own, so that no result depends on the lines before it: with a seed, each starts from that seed, without one each
    draws another. Several decode together; when one is finished, the next takes its place. There are never more lines in memory than
    conversations that were begun and not yielded yet: `parallel`, and HELD_BACK more if ordered.

    Args:
        lines: of the input, as bytes; read in other threads, by one of them at a time.
        model: the weights.
        config: of every session; a line can have it otherwise (kvlocal.batch.line.OPTIONS, a system message). The memory for archives is for those of
            all that decode together.
        parallel: how many conversations decode together, each in cells of its own.
        ordered: yield in the order of the lines instead of the order of completion.
        wanted: whether a line, given by its number and itself, is to be completed.
        poll: called between two steps of all conversations, each a token or a micro-batch of a long text; an exception from it ends the batch.
        nexus: for the policies that need Nexus tokens.

    Raises:
        KvlocalError: no session is possible with this configuration. What concerns one conversation only is a Failure.
    """
    return answered(lines, InProcess(parallel, model, config, nexus), ordered=ordered, wanted=wanted, poll=poll)


def answered(
    lines: Iterable[bytes],
    workplace: Workplace,
    *,
    ordered: bool = False,
    wanted: Callable[[int, bytes], bool] = lambda number, line: True,
    poll: Callable[[], None] = lambda: None,
) -> Generator[Outcome, None, None]:
    """As run_batch, wherever lines are answered. The iterator closes the workplace when it is closed or ends."""
    outcomes = _Batch(lines, workplace, ordered, wanted, poll).outcomes()
    # to its first step, so that closing it closes the workplace also where nobody asked for a result
    next(outcomes)
    return outcomes


class _Batch:
    """Gives the lines of the input to a workplace, and what became of them to whoever asks, in order if that is wanted."""

    def __init__(
        self,
        lines: Iterable[bytes],
        workplace: Workplace,
        ordered: bool,
        wanted: Callable[[int, bytes], bool],
        poll: Callable[[], None],
    ) -> None:
        self._workplace, self._ordered, self._poll = workplace, ordered, poll
        # of the lines; one thread at a time waits for the next
        self._reading = threading.Lock()
        self._lines = ((number, line) for number, line in enumerate(lines, 1) if not is_blank(line) and wanted(number, line))
        self._n_taken = 0
        self._at_end = self._closed = False
        # for conversations that were begun and not yielded yet
        self._places = threading.Semaphore(workplace.n_lines + (HELD_BACK if ordered else 0))
        # each with the number of lines that were taken before its own
        self._finished: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()
        self._error: BaseException | None = None
        # daemons, because one that waits for a line may wait forever
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workplace.n_threads)]

    def outcomes(self) -> Generator[Any, None, None]:
        """Yields once before anything is begun, and then the outcomes."""
        try:
            yield None
            for thread in self._threads:
                thread.start()
            ready: list[tuple[int, Outcome]] = []
            n_yielded = 0
            while True:
                ended = self._at_end and n_yielded == self._n_taken
                self._poll()
                if self._error:
                    raise self._error
                if ended:
                    return
                while not self._finished.empty():
                    heapq.heappush(ready, self._finished.get())
                if ready and (not self._ordered or ready[0][0] == n_yielded):
                    yield heapq.heappop(ready)[1]
                    n_yielded += 1
                    self._places.release()
                else:
                    self._workplace.advance(_POLL_SECONDS)
        finally:
            self._closed = True
            self._places.release(len(self._threads))
            self._workplace.close()
            self._join()

    def _join(self) -> None:
        """Waits for the threads to end, unless one waits for a line, which it may do forever."""
        if self._reading.acquire(timeout=_POLL_SECONDS):
            self._reading.release()
            for thread in self._threads:
                if thread.ident:
                    thread.join()

    def _work(self) -> None:
        try:
            self._workplace.work(self._take, self._finish)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - the thread that waits for the results raises it
            self._error = error

    def _take(self) -> Taken | None:
        """The next line, None if there is none."""
        self._places.acquire()
        with self._reading:
            number, line = (0, b"") if self._closed else next(self._lines, (0, b""))
            if not number:
                self._at_end = True
                return None
            self._n_taken += 1
            return Taken(self._n_taken - 1, number, line)

    def _finish(self, taken: Taken, outcome: Outcome) -> None:
        self._finished.put((taken.place, outcome))
