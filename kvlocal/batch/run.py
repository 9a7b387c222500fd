"""Answers a file of conversations: one JSON object a line in, one a line out; several of them decode together."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

from kvlocal.batch.line import Failure, Line, LineError, Result
from kvlocal.cache.compression import Seconds
from kvlocal.cache.fitting import fitted
from kvlocal.chat.beside import slots_for
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.logprobs import logprobs
from kvlocal.chat.session import ChatSession
from kvlocal.chat.stats import REPORTED
from kvlocal.errors import KvlocalError
from kvlocal.files.text import is_blank
from kvlocal.llama.model import Model
from kvlocal.llama.scheduler import Stopped
from kvlocal.llama.slots import Slots
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.markup import Message

# so many finished results wait at most for the one that comes before them
HELD_BACK = 64

_POLL_SECONDS = 0.1  # between two polls while nothing happens

Outcome = Result | Failure


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
    config = fitted(model.path, config, model.n_gpu_layers)
    # Now, not when the first result is asked for: what is wrong with the configuration itself would fail every line.
    slots, budget = slots_for(parallel, model, config, nexus)
    outcomes = _Batch(lines, model, config.shared_by(parallel), budget, slots, parallel, ordered, wanted, poll, nexus).outcomes()
    # to its first step, so that closing it frees the slots also where nobody asked for a result
    next(outcomes)
    return outcomes


class _Batch:
    """Threads that take lines and complete them, in turns."""

    def __init__(
        self,
        lines: Iterable[bytes],
        model: Model,
        config: SessionConfig,
        budget: int,
        slots: Slots,
        parallel: int,
        ordered: bool,
        wanted: Callable[[int, bytes], bool],
        poll: Callable[[], None],
        nexus: NexusTokens | None,
    ) -> None:
        self._model, self._config, self._budget, self._nexus = model, config, budget, nexus
        self._ordered, self._poll = ordered, poll
        self._slots, self._scheduler = slots, slots.scheduler
        # of the lines; one thread at a time waits for the next
        self._reading = threading.Lock()
        self._lines = ((number, line) for number, line in enumerate(lines, 1) if not is_blank(line) and wanted(number, line))
        self._n_taken = 0
        # for conversations that were begun and not yielded yet
        self._places = threading.Semaphore(parallel + (HELD_BACK if ordered else 0))
        # each with the number of lines that were taken before its own
        self._finished: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()
        self._error: BaseException | None = None
        # daemons, because one that waits for a line may wait forever
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(parallel)]
        self._n_working = parallel

    def outcomes(self) -> Generator[Any, None, None]:
        """Yields once before anything is begun, and then the outcomes."""
        try:
            yield None
            for thread in self._threads:
                thread.start()
            ready: list[tuple[int, Outcome]] = []
            n_yielded = 0
            while True:
                ended = not self._n_working
                self._poll()
                if self._error:
                    raise self._error
                while not self._finished.empty():
                    heapq.heappush(ready, self._finished.get())
                if ended and not ready:
                    return
                if ready and (not self._ordered or ready[0][0] == n_yielded):
                    yield heapq.heappop(ready)[1]
                    n_yielded += 1
                    self._places.release()
                else:
                    self._scheduler.advance(_POLL_SECONDS)
        finally:
            self._scheduler.stop()
            self._places.release(len(self._threads))
            self._slots.close()

    def _work(self) -> None:
        try:
            while taken := self._take():
                place, number, line = taken
                with self._scheduler.turn():
                    self._finished.put((place, self._outcome(number, line)))
            with self._scheduler.turn():
                self._n_working -= 1
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - the thread that waits for the results raises it
            self._error = error

    def _take(self) -> tuple[int, int, bytes] | None:
        """The next line: how many were taken before, its number, and itself; None if there is none."""
        self._places.acquire()
        with self._reading:
            number, line = next(self._lines, (0, b""))
            place = self._n_taken
            self._n_taken += 1
        return (place, number, line) if number else None

    def _outcome(self, number: int, line: bytes) -> Outcome:
        try:
            parsed = Line.parse(number, line)
        except LineError as error:
            return Failure(number, error.id, error)
        try:
            return self._complete(parsed)
        except KvlocalError as error:
            return Failure(number, parsed.id, error)

    def _complete(self, line: Line) -> Result:
        config, unanswered = line.configure(self._config), line.unanswered
        if not unanswered:
            kv: dict[str, float] = dict.fromkeys(REPORTED, 0)
            kv["budget"] = config.budget or self._budget
            return Result(line.number, line.id, line.messages, [], [], None, kv, _timings(0.0, 0, 0, 0.0, Seconds()))

        started = time.perf_counter()
        first, end = (0 if line.system is None else 1), unanswered[-1] + 1
        messages, stop_reasons, recalled, chances = line.messages[:first], [], [], []
        answer_tokens, answer_seconds = 0, 0.0
        with self._session(config) as session:
            pending: list[Message] = []
            for i in range(first, end):
                message = line.messages[i]
                messages.append(message)
                pending.append(message)
                if message["role"] != "assistant" and i not in unanswered and line.messages[i + 1]["role"] != "assistant":
                    # read with what follows
                    continue
                session.add_messages(pending)
                pending = []
                if i in unanswered:
                    for _ in session.answer(line.asked):
                        pass
                    messages.append(dict(session.messages[-1]))
                    last = session.last
                    assert last is not None  # after an answer
                    stop_reasons.append(last.stop_reason)
                    recalled.append(last.recalled)
                    chances.append({"content": logprobs(last.logprobs)})
                    answer_tokens += last.answer_tokens
                    answer_seconds += last.answer_seconds
                if i < end - 1:
                    session.finish_turn()
                    session.second_read()
            kv = session.kv.report()
            prompt_tokens = int(kv["history_tokens"]) - answer_tokens
            timings = _timings(time.perf_counter() - started, prompt_tokens, answer_tokens, answer_seconds, session.seconds)
            return Result(
                line.number, line.id, messages + line.messages[end:], stop_reasons, recalled, session.seed, kv, timings,
                None if line.asked.top_logprobs is None else chances,
            )  # fmt: skip

    def _session(self, config: SessionConfig) -> ChatSession:
        """A session in a slot."""
        return ChatSession(self._model, config, nexus=self._nexus, undo=False, make_context=self._slots.open)


def _timings(seconds: float, prompt_tokens: int, answer_tokens: int, answer_seconds: float, phases: Seconds) -> dict[str, float]:
    times = {"seconds": seconds, "prompt_seconds": seconds - answer_seconds, "answer_seconds": answer_seconds}
    times |= {f"{phase}_seconds": value for phase, value in asdict(phases).items()}
    speed = answer_tokens / answer_seconds if answer_seconds else 0.0
    counts = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "tokens_per_second": round(speed, 2)}
    return counts | {name: round(value, 4) for name, value in times.items()}
