"""Answers a file of conversations: one JSON object a line in, one a line out."""

from __future__ import annotations

import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from kvlocal.compression import Seconds
from kvlocal.engine import Model
from kvlocal.errors import KvlocalError
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.session import REPORTED, ChatSession, Message, SessionConfig

ROLES = ("system", "user", "assistant")



class LineError(KvlocalError):
    """A line of the input is no conversation."""


@dataclass(frozen=True)
class Job:
    """A conversation to complete.

    number: of its line, from 1
    id: any JSON scalar; the line number if the line has none
    messages: {"role", "content"}, at least one
    """

    number: int
    id: str | int | float | bool | None
    messages: list[Message]

    @classmethod
    def parse(cls, number: int, line: bytes) -> Self:
        """Reads `{"id": ..., "messages": [{"role", "content"}, ...]}`; other keys, of messages too, are left out.

        Raises LineError, in one sentence, if the line is not UTF-8 or not such an object, or if the roles come in an order no chat has:
        a system message that is not the first, or an answer to nothing.
        """
        try:
            record = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse, parse_float=_finite)
        except UnicodeDecodeError:
            raise LineError("it is not UTF-8: convert the file") from None
        except json.JSONDecodeError as error:
            raise LineError(f"it is not JSON ({error.msg} at column {error.colno}): write one object a line") from None
        except (ValueError, RecursionError) as error:
            raise LineError(f"it cannot be read as JSON ({error}): write one object a line") from None
        if not isinstance(record, dict) or "messages" not in record:
            raise LineError('it has no messages: write {"id": ..., "messages": [{"role": ..., "content": ...}]}')
        identity, messages = record.get("id", number), record["messages"]
        if isinstance(identity, (dict, list)):
            raise LineError("its id is not a scalar: use a string or a number")
        if not isinstance(messages, list) or not messages:
            raise LineError("its messages are not a list with at least one message in it: give the conversation's turns")
        for i, message in enumerate(messages):
            _check_message(i, message, messages[i - 1]["role"] if i else None)
        return cls(number, identity, [{"role": message["role"], "content": message["content"]} for message in messages])

    @property
    def system(self) -> str | None:
        """The conversation's own system prompt."""
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else None

    @property
    def unanswered(self) -> list[int]:
        """Indices of the user turns that no assistant turn follows."""
        roles = [message["role"] for message in self.messages] + ["user"]
        return [i for i in range(len(self.messages)) if roles[i] == "user" and roles[i + 1] == "user"]


@dataclass(frozen=True)
class Result:
    """A completed conversation.

    number, id: of its job
    messages: the given ones, with the answers in their places
    stop_reasons: of each answer, "end" or "length" (cut off at max_tokens)
    seed: of the random numbers; None for a conversation with nothing to answer, which is not read
    kv: budget, peak_cells, history_tokens, compressions, evicted (KvStats)
    timings: seconds in all; prompt_tokens, and prompt_seconds for them and for setting up; answer_tokens, answer_seconds, tokens_per_second;
        and where the time went (kvlocal.compression.Seconds)
    """

    number: int
    id: str | int | float | bool | None
    messages: list[Message]
    stop_reasons: list[str]
    seed: int | None
    kv: dict[str, int]
    timings: dict[str, float]

    def record(self) -> dict[str, Any]:
        """The object of the output line."""
        fields = asdict(self)
        del fields["number"]
        return fields


@dataclass(frozen=True)
class Failure:
    """A line that gave no result, and why."""

    number: int
    error: KvlocalError


def run_batch(
    lines: Iterable[bytes],
    model: Model,
    config: SessionConfig,
    *,
    poll: Callable[[], None] = lambda: None,
    nexus: NexusTokens | None = None,
) -> Iterator[Result | Failure]:
    """Completes each conversation, in order, and yields what became of it; blank lines are skipped.

    Each has a session of its own, so that no result depends on the lines before it: with a seed, each starts from that seed, without one each
    draws another. Only one line is in memory at a time.

    Args:
        lines: of the input, as bytes.
        model: the weights.
        config: of every session; a system message in a conversation replaces its system prompt.
        nexus: for the policies that need Nexus tokens.
        poll: called before every conversation, token and micro-batch of a long text; an exception from it ends the batch.

    Raises:
        KvlocalError: no session is possible with this configuration. What concerns one conversation only is a Failure.
    """
    # Now, not when the first result is asked for: what is wrong with the configuration itself would fail every line.
    with ChatSession(model, config, nexus=nexus) as session:
        settled = replace(config, budget=session.budget)
    return _outcomes(lines, model, settled, nexus, poll)


def _outcomes(
    lines: Iterable[bytes], model: Model, config: SessionConfig, nexus: NexusTokens | None, poll: Callable[[], None]
) -> Iterator[Result | Failure]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            outcome = _complete(Job.parse(number, line), model, config, nexus, poll)
        except KvlocalError as error:
            outcome = Failure(number, error)
        yield outcome


def _complete(job: Job, model: Model, config: SessionConfig, nexus: NexusTokens | None, poll: Callable[[], None]) -> Result:
    unanswered = job.unanswered
    if not unanswered:
        kv = dict.fromkeys(REPORTED, 0) | {"budget": config.budget}
        return Result(job.number, job.id, job.messages, [], None, kv, _timings(0.0, 0, 0, 0.0, Seconds()))

    started = time.perf_counter()
    first, end = (0 if job.system is None else 1), unanswered[-1] + 1
    messages, stop_reasons = job.messages[:first], []
    answer_tokens, answer_seconds = 0, 0.0
    if job.system is not None:
        config = replace(config, system=job.system)
    poll()
    with ChatSession(model, config, progress=lambda done, total: poll(), nexus=nexus) as session:
        for i in range(first, end):
            message = job.messages[i]
            session.add_turn(message["role"], message["content"])
            messages.append(message)
            if i in unanswered:
                for _ in session.answer():
                    poll()
                messages.append(dict(session.messages[-1]))
                stop_reasons.append(session.last.stop_reason)
                answer_tokens += session.last.answer_tokens
                answer_seconds += session.last.answer_seconds
            session.finish_turn()
            session.second_read(lambda: poll() is not None)
        kv = session.kv.report()
        prompt_tokens = kv["history_tokens"] - answer_tokens
        timings = _timings(time.perf_counter() - started, prompt_tokens, answer_tokens, answer_seconds, session.seconds)
        return Result(job.number, job.id, messages + job.messages[end:], stop_reasons, session.seed, kv, timings)


def _timings(seconds: float, prompt_tokens: int, answer_tokens: int, answer_seconds: float, phases: Seconds) -> dict[str, float]:
    times = {"seconds": seconds, "prompt_seconds": seconds - answer_seconds, "answer_seconds": answer_seconds}
    times |= {f"{phase}_seconds": value for phase, value in asdict(phases).items()}
    speed = answer_tokens / answer_seconds if answer_seconds else 0.0
    counts = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "tokens_per_second": round(speed, 2)}
    return counts | {name: round(value, 4) for name, value in times.items()}


class LineWriter:
    """Writes records as JSON lines, each whole and on the disk before the next one begins; a context manager.

    A killed process leaves whole lines, and at most its last one cut off. Nothing is created or replaced before the `with` block is entered.

    path: None for standard output
    replace: write over a file that is there
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, replace: bool = False) -> None:
        """Raises KvlocalError if the file is there already, with something in it, and is not to be replaced."""
        self._path = None if path is None else Path(path)
        self._replace = replace
        # Nor have devices and pipes anything to lose.
        if self._path and self._path.is_file() and self._path.stat().st_size and not replace:
            raise self._taken()

    def _taken(self) -> KvlocalError:
        return KvlocalError(f"{self._path} is there already: name another file or replace it with --force")

    def __enter__(self) -> Self:
        if self._path is None:
            self._handle, name = os.dup(1), "standard output"
        else:
            mode = os.O_TRUNC if self._replace else 0 if self._path.exists() else os.O_EXCL
            try:
                self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | mode, 0o666)
            except FileExistsError:
                raise self._taken() from None
            except OSError as error:
                raise KvlocalError(f"cannot write {self._path} ({error.strerror}): name another file") from error
            name = str(self._path)
        self._name = name
        self._is_file = stat.S_ISREG(os.fstat(self._handle).st_mode)
        return self

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line.

        Raises:
            KvlocalError: the line cannot be written; a file then ends where it did before.
            BrokenPipeError: nobody reads standard output any more.
        """
        # Escapes what is no character (half of a surrogate pair), as JSON does.
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        before = os.fstat(self._handle).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            if self._is_file:
                os.fsync(self._handle)
        except BrokenPipeError:
            raise
        except OSError as error:
            if self._is_file:
                os.ftruncate(self._handle, before)
            raise KvlocalError(f"cannot write {self._name} ({error.strerror}): the lines before this one are there, run the others again") from error

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def _check_message(index: int, message: Any, role_before: str | None) -> None:
    if not isinstance(message, dict):
        raise LineError(f'message {index + 1} is not an object: write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role not in ROLES:
        raise LineError(f"message {index + 1} has the role {json.dumps(role)[:40]}: use one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise LineError(f"the content of message {index + 1} is not a string: give its text")
    if role == "system" and index > 0:
        raise LineError(f"message {index + 1} is a system message: it can only be the first")
    if role == "assistant" and role_before != "user":
        raise LineError(f"message {index + 1} answers nothing: put a user turn before it")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    """Otherwise 1e999 would come out as Infinity, which is no JSON."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value
