"""InProcess: the lines of a batch answered by a model in this process, several of them in steps that they decode together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

from kvlocal.batch.line import Failure, Line, LineError, Outcome, Result
from kvlocal.batch.workplace import Taken
from kvlocal.cache.compression import Seconds
from kvlocal.cache.fitting import fitted
from kvlocal.chat.beside import slots_for
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.logprobs import logprobs
from kvlocal.chat.session import ChatSession
from kvlocal.chat.stats import REPORTED
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.markup import Message


class InProcess:
    """A workplace (kvlocal.batch.workplace) in whose threads conversations take turns, while the driver decodes what they wait for.

    parallel: how many conversations decode together, each in cells of its own
    model: the weights; to be closed after the workplace
    config: of every session; a line can have it otherwise. The memory for archives is for those of all that decode together
    nexus: for the policies that need Nexus tokens

    Raises:
        KvlocalError: no session is possible with this configuration, or there is not enough memory for so many.
    """

    def __init__(self, parallel: int, model: Model, config: SessionConfig, nexus: NexusTokens | None = None) -> None:
        config = fitted(model.path, config, model.placement)
        # Now, not when the first result is asked for: what is wrong with the configuration itself would fail every line.
        self._slots, self._budget = slots_for(parallel, model, config, nexus)
        self._model, self._config, self._nexus = model, config.shared_by(parallel), nexus
        self.n_lines = self.n_threads = parallel

    def work(self, take: Callable[[], Taken | None], finish: Callable[[Taken, Outcome], None]) -> None:
        """Answers lines one after another, in one of its threads.

        Raises:
            Stopped: the workplace is closed.
        """
        scheduler = self._slots.scheduler
        while taken := take():
            with scheduler.turn():
                finish(taken, self._outcome(taken.number, taken.line))
        with scheduler.turn():
            # the driver is told that there are no more
            pass

    def answer(self, number: int, line: bytes) -> Outcome:
        """What becomes of one line, while another thread is the driver.

        Raises:
            Stopped: the workplace is closed.
        """
        with self._slots.scheduler.turn():
            return self._outcome(number, line)

    def advance(self, seconds: float) -> None:
        """For the driver: a step of all conversations, or so many seconds without any."""
        self._slots.scheduler.advance(seconds)

    def close(self) -> None:
        """Ends what the threads are doing, and frees the cells."""
        self._slots.scheduler.stop()
        self._slots.close()

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
            return Result(line.number, line.id, line.messages, [], [], None, kv, batch_timings(0.0, 0, 0, 0.0, Seconds()))

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
            timings = batch_timings(time.perf_counter() - started, prompt_tokens, answer_tokens, answer_seconds, session.seconds)
            return Result(
                line.number, line.id, messages + line.messages[end:], stop_reasons, recalled, session.seed, kv, timings,
                None if line.asked.top_logprobs is None else chances,
            )  # fmt: skip

    def _session(self, config: SessionConfig) -> ChatSession:
        """A session in a slot."""
        return ChatSession(self._model, config, nexus=self._nexus, undo=False, make_context=self._slots.open)


def batch_timings(seconds: float, prompt_tokens: int, answer_tokens: int, answer_seconds: float, phases: Seconds) -> dict[str, float]:
    """What Result tells of the time that a conversation took, in all and in phases."""
    times = {"seconds": seconds, "prompt_seconds": seconds - answer_seconds, "answer_seconds": answer_seconds}
    times |= {f"{phase}_seconds": value for phase, value in asdict(phases).items()}
    speed = answer_tokens / answer_seconds if answer_seconds else 0.0
    counts = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "tokens_per_second": round(speed, 2)}
    return counts | {name: round(value, 4) for name, value in times.items()}
