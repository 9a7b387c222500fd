"""Embeddings: embeds texts beside the conversations of an engine, in a context of their own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvlocal.chat.text_session import Prompt
from kvlocal.llama.embedding import Embedder
from kvlocal.llama.free_cores import Threads
from kvlocal.llama.model import Model
from kvlocal.llama.scheduler import Scheduler, Stopped
from kvlocal.serving.live import Cancelled
from kvlocal.serving.request import EngineBusy, EngineClosed

_CLOSING = "the engine is closing: ask again when it has started anew"


class Embedded(NamedTuple):
    """The embedding of a text.

    vector: float32 [n_embd], of length 1
    n_tokens: of the text
    """

    vector: npt.NDArray[np.float32]
    n_tokens: int


@dataclass(eq=False)
class _Job:
    """A request.

    texts: those that are still to be embedded; tokens once it is worked on
    gone: set when nobody waits for it any more
    """

    texts: deque[Prompt]
    gone: threading.Event
    future: Future[list[Embedded]] = field(default_factory=Future)
    found: list[Embedded] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)


class Embeddings:
    """Embeds texts, one of each request in turn. What computes is called in the thread that computes everything (kvlocal.llama.scheduler),
    micro-batch by micro-batch; between two of them the conversations get as much time, if there are any.

    The context is made for the first text.

    scheduler: of the conversations
    waiting: requests that may wait
    """

    def __init__(self, model: Model, scheduler: Scheduler, waiting: int, n_threads: Threads) -> None:
        self._model, self._scheduler, self._waiting, self._n_threads = model, scheduler, waiting, n_threads
        self._embedder: Embedder | None = None
        self._executor = ThreadPoolExecutor(1, "kvlocal-embeddings")
        self._gone = threading.Event()  # of the request that is worked on
        # guards what follows
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)
        self._refuses = self._closing = False
        self._n_requests = 0
        self._seconds = 1.0  # that a request takes, a moving average

    def submit(self, texts: Sequence[Prompt], gone: threading.Event) -> Future[list[Embedded]]:
        """The embeddings of texts, or of their tokens, as soon as they are there. What goes wrong is the exception of the result: EmbeddingError if
        one of them has no embedding, EngineClosed, Cancelled after `gone` was set.

        Raises:
            EngineBusy: too many wait already.
            EngineClosed: it takes no more.
        """
        with self._lock:
            if self._refuses:
                raise EngineClosed("the engine is closing: start it again")
            if self._n_requests > self._waiting:
                raise EngineBusy(max(1.0, self._seconds * self._n_requests))
            self._n_requests += 1
            job = _Job(deque(texts), gone)
            # also if it is cancelled before it begins
            job.future.add_done_callback(lambda _: self._leave(job))
            self._executor.submit(self._step, job)
            return job.future

    @property
    def n_requests(self) -> int:
        """Requests that are worked on or wait."""
        return self._n_requests

    def _leave(self, job: _Job) -> None:
        with self._lock:
            self._n_requests -= 1
            self._seconds += (time.perf_counter() - job.started - self._seconds) / 8
            self._left.notify_all()

    def _step(self, job: _Job) -> None:
        """Embeds the next text of a request; the others come behind what waits meanwhile."""
        if not job.future.running() and not job.future.set_running_or_notify_cancel():
            return
        self._gone = job.gone
        try:
            embedder = self._embedder = self._embedder or Embedder(self._model, n_threads=self._n_threads, compute=self._compute)
            if not job.found:
                # what is wrong with one of them is told before the first is computed
                job.texts = deque(embedder.checked(text) for text in job.texts)
            if job.texts:
                tokens = job.texts.popleft()
                job.found.append(Embedded(embedder.embed(tokens), len(tokens)))
        except BaseException as error:  # noqa: BLE001 - it is that of the request
            job.future.set_exception(error)
            return
        with self._lock:
            if job.texts and not self._closing:
                self._executor.submit(self._step, job)
                return
        if job.texts:
            job.future.set_exception(EngineClosed(_CLOSING))
        else:
            job.future.set_result(job.found)

    def _compute(self, function: Callable[[], Any]) -> Any:
        if self._closing:
            raise EngineClosed(_CLOSING)
        if self._gone.is_set():
            raise Cancelled
        seconds = 0.0

        def timed() -> Any:
            nonlocal seconds
            started = time.perf_counter()
            try:
                return function()
            finally:
                seconds = time.perf_counter() - started

        try:
            with self._scheduler.turn():
                result = self._scheduler.call(timed)
        except Stopped:
            raise EngineClosed(_CLOSING) from None
        if self._scheduler.busy:
            time.sleep(seconds)
        return result

    def close(self, grace_seconds: float = 0.0) -> None:
        """Takes no more requests, gives those there are so much time, ends them, and frees the context; the driver has to run still."""
        with self._lock:
            self._refuses = True
            self._left.wait_for(lambda: not self._n_requests, grace_seconds)
            self._closing = True
        self._executor.shutdown()
        if self._embedder is not None:
            self._embedder.close()
