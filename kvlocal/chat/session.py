"""ChatSession: the turns of one conversation, inside a fixed KV budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.cache.budgeted import BudgetedCache, Passage, Progress
from kvlocal.cache.compression import Seconds
from kvlocal.cache.noted_cells import Arrays, Limits
from kvlocal.cache.second_read import SecondRead
from kvlocal.chat.answering import AnswerInProgress, ended_by_model, keep_said, text_of
from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.opening import checked_opening, checked_template, repetition
from kvlocal.chat.state import Mark, SessionState, limits, with_state, without_state
from kvlocal.chat.stats import KvStats, SegmentStats, TurnStats, segment_stats
from kvlocal.chat.turn_reader import TurnReader
from kvlocal.errors import KvlocalError
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import Sampler, SamplingParams
from kvlocal.llama.sequence_decoder import SequenceDecoder
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.pieces import Piece

Message = dict[str, str]


class ChatSession:
    """A conversation that never ends, in a cache that never grows.

    Every token is evaluated once. The cache is compressed when it exceeds the budget by the stride, also in the middle of a long prompt or
    answer; the system prompt and the sinks always stay. When positions come near the end of the trained context, kept keys are rotated back
    to low positions and the conversation goes on.

    After a failure in the middle of a change the cache is not used any more: the next call reads the conversation again.

    model: the weights; must outlive the session
    config: budget, policy and sampling
    progress: called with (tokens done, tokens in all) while a long text is read
    spare: cells beyond those that budget and stride need, for what is read in hold()
    n_outputs: tokens of a micro-batch whose logits are kept
    nexus: for the policies that need Nexus tokens: read behind every finished turn
    undo: keep what the last turn is taken back with at once, a copy of the cache among it; without, what came before is read again
    make_context: makes the cells: Context, or what gives a stream beside others (kvlocal.llama.slots)

    cache: the tokens of the conversation (kvlocal.cache.budgeted)
    messages: the conversation, {"role", "content"}, without the system prompt; an answer that was stopped is there as far as it came
    last: the last answer in numbers, None before the first
    prediction: logits after the last turn that was read, float32 [n_vocab], None before the first
    max_tokens: the longest answer; may be set
    n_answers: answers so far, given ones and those that were taken back too; the random numbers of the next one depend on it; may be set

    Raises SessionError or CacheError if budget, system prompt and model do not go together, EngineError or NativeError if the model cannot be
    run or compressed. Nothing is left open then.
    """

    def __init__(
        self,
        model: Model,
        config: SessionConfig = SessionConfig(),
        *,
        progress: Progress | None = None,
        spare: int = 0,
        n_outputs: int = 1,
        nexus: NexusTokens | None = None,
        undo: bool = True,
        make_context: Callable[..., SequenceDecoder] = Context,
    ):
        self.model = model
        self.config = config
        self.template = checked_template(model, config, nexus)
        self.messages: list[Message] = []
        self.last: TurnStats | None = None
        self.max_tokens = config.max_tokens
        self._system = config.system
        self._undo = undo
        # of the last user turn, until it has ended
        self._answer: AnswerInProgress | None = None
        with ExitStack() as opened:
            self.cache = BudgetedCache(model, config, spare=spare, n_outputs=n_outputs, undo=undo, make_context=make_context)
            opened.callback(self.cache.close)
            needs = self.cache.policy.needs
            self._reader = TurnReader(self.cache, self.template, nexus if "nexus" in needs else None, progress)
            self._second_read = SecondRead(self.cache, repetition(model, self.template)) if config.idle and "reread" in needs else None
            self._sampler = Sampler(model, config.sampling)
            opened.callback(lambda sampler: sampler.close(), self._sampler)
            self._begin()
            opened.pop_all()

    # what is in the cache

    def _begin(self) -> None:
        """An empty cache with the system prompt in it."""
        self._reader.read(self._reset())
        self.cache.ledger.n_reread = self.cache.ledger.n_tokens

    def _reset(self) -> Sequence[Piece]:
        """An empty cache; returns what a conversation begins with."""
        self._leave_answer()
        self._mark: Mark | None = None
        self.prediction: npt.NDArray[np.float32] | None = None
        self.messages.clear()
        self.last = None
        self.n_answers = 0
        self._sampler.reset()
        pieces, n_system = checked_opening(self.model, self.config, self.template, self._system)
        self.cache.begin(n_system)
        return pieces

    def finish_turn(self) -> None:
        """Reads what ends the last answer, and Nexus tokens behind it, if the policy has them: now instead of with the next user turn."""
        self._end_answer()
        if self.cache.uncertain or not self._reader.nexus or not self._reader.ends_with("assistant") or self.messages[-1]["role"] != "assistant":
            return
        n_tokens = self.cache.ledger.n_tokens
        try:
            self._finish_turn()
        except BaseException:
            self.cache.set_length(n_tokens)
            raise

    def _finish_turn(self) -> None:
        self._reader.finish_answer(self.template.close_assistant(self._history_for_template(), self.messages[-1]["content"]))

    # turns

    def send(self, text: str) -> Iterator[str]:
        """Appends a user turn and generates the answer: yields its text as it comes, never half a character."""
        self.add_turn("user", text)
        return self.answer()

    def add_turn(self, role: str, content: str) -> None:
        """Appends a given turn, "user" or "assistant"; user turns and answers alternate. The last user turn may be answered with answer().

        An answer that is still on its way ends here.
        """
        self._end_answer()
        last = self.messages[-1]["role"] if self.messages else "assistant"
        if role not in ("user", "assistant") or role == last:
            raise SessionError(f"after a turn of the {last} comes one of the {'user' if last == 'assistant' else 'assistant'}, not of {role!r}")
        self._settle()
        self._answer = AnswerInProgress(self._reader) if role == "user" else None
        if role == "user":
            if self._undo:
                self._mark = Mark(self.cache.ledger.n_tokens, len(self.messages), list(self._sampler.recent))
            self.cache.mark()
            pieces = self.template.user_turn(self._history_for_template(), content)
        else:
            pieces = self.template.given_assistant(self._history_for_template(), content)
        self.messages.append({"role": role, "content": content})
        try:
            if role == "user" and self._reader.nexus and self._reader.ends_with("assistant"):
                self._finish_turn()
            started = time.perf_counter()
            self._prompt = self._reader.read(pieces), time.perf_counter() - started
        except BaseException:
            self._take_back(role)
            raise
        self.prediction = self.cache.context.logits()
        self.n_answers += role == "assistant"

    def _take_back(self, role: str) -> None:
        """A turn that could not be read to its end is as if it had not been given."""
        self._answer = None
        if role == "user" and self._mark:
            self._rewind()
        else:
            self._try_to_read_again(self.messages[:-1])

    def _history_for_template(self, n: int | None = None) -> list[Message]:
        """What the template has to know of the first n messages, of all if None."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        # the markup depends on no more than the last turns
        return system + self.messages[:n][-2:]

    def answer(self) -> Iterator[str]:
        """Generates the answer to the last user turn: yields its text as it comes.

        The answer is part of the conversation from this call on. Closing the iterator, stop(), or an exception inside it, ends the answer; what
        there is of it stays. So does the next call that changes the conversation; the iterator raises SessionError after that.
        """
        self._settle()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise SessionError("there is no user turn to answer: send one first")
        answer = self._answer = self._answer or AnswerInProgress(self._reader)
        start = self.template.answer_start(self._history_for_template(len(self.messages) - 1))
        self.messages.append(answer.begin(self._sampler, start, *self._prompt))
        self._sampler.begin(self.n_answers)
        self.n_answers += 1
        return self._texts(answer)

    def _texts(self, answer: AnswerInProgress) -> Iterator[str]:
        try:
            yield from answer.texts(self.max_tokens)
        except (Exception, KeyboardInterrupt):
            if not answer.over:
                self._mend(answer)
            raise
        finally:
            if self._answer is answer:
                self._end_answer()

    def _end_answer(self) -> None:
        """An answer that is on its way ends as far as it came."""
        answer = self._answer
        if answer and answer.message is not None:
            self._answer = None
            answer.end()
            self.last = answer.stats

    def _leave_answer(self) -> None:
        """An answer that is on its way is of a conversation that is no more."""
        if self._answer and self._answer.message is not None:
            self._answer.over = True
        self._answer = None

    def add_answer(self, content: str, drawn: Sequence[int]) -> None:
        """As add_turn("assistant", content), for an answer that was drawn as these tokens (TurnStats.drawn): they are evaluated one by one, so
        that the cache becomes what it was then, and not only nearly so. If they are not the tokens of that text, it is added as any other.
        """
        self._end_answer()
        self._settle()
        if max(drawn, default=0) >= self.model.n_vocab or min(drawn, default=0) < 0:
            drawn = ()
        stream = self.template.answer_stream(self.model)
        if text_of(stream, drawn, self.template) != content or not self.messages or self.messages[-1]["role"] != "user":
            return self.add_turn("assistant", content)
        self._answer = None
        start = self.template.answer_start(self._history_for_template(len(self.messages) - 1)) if drawn else []
        self.messages.append({"role": "assistant", "content": content})
        try:
            self._reader.read(start)
            fed = []
            for token in drawn:
                self._sampler.accept(token)
                if token not in self.template.end_tokens:
                    self.cache.append(np.array([token], np.int32), "decode")
                    fed.append(token)
            if not ended_by_model(drawn, self.template) or stream.has_closing:
                keep_said(self._reader, self._sampler, stream, fed, content)
        except BaseException:
            self._take_back("assistant")
            raise
        self.n_answers += 1
        self.cache.describe(content)

    def second_read(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Reads the finished turns that were not read again yet a second time, for a policy that scores cells by it (KVzip).

        It leaves nothing in the cache but scores. Where it was stopped it goes on the next time.

        stop: asked before every stretch, which is a micro-batch at most

        Returns whether nothing is left to read.
        """
        self._end_answer()
        if self._second_read is None or self.cache.uncertain or not self.messages or self.messages[-1]["role"] != "assistant":
            return True
        return self._second_read.run(stop)

    def compress(self) -> None:
        """Compresses to the budget now, if the cache is over it."""
        self._settle()
        self.cache.compress()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing is compressed inside, and on exit cache, ledger and messages are as they were. Can be nested.

        What is read inside must fit into the free and the spare cells. A user turn from outside cannot be followed by answer() inside any more.
        """
        self._end_answer()
        self._settle()
        messages, last, mark, prediction, answer = list(self.messages), self.last, self._mark, self.prediction, self._answer
        n_answers = self.n_answers
        self._mark = None
        try:
            with self.cache.hold():
                yield
        finally:
            self._mark, self.last, self.prediction, self._answer, self.messages[:] = mark, last, prediction, answer, messages
            self.n_answers = n_answers

    def answer_passages(self, content: str) -> list[Passage]:
        """What a given answer to the last user turn would append to the cache."""
        return self._reader.passages(self.template.given_assistant(self._history_for_template(), content))

    def stop(self) -> None:
        """Ends the answer that is on its way after its current token, or before its first one while the turn is still read; safe in a signal
        handler."""
        answer = self._answer
        if answer is not None:
            answer.stopped = True

    def regenerate(self) -> Iterator[str]:
        """Takes the last answer back and generates another one."""
        self._end_answer()
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise SessionError("there is no answer to replace: send something first")
        user, _ = self.undo()
        return self.send(user["content"])

    def undo(self) -> list[Message]:
        """Takes the last user turn and what follows it out of the conversation and the cache, and returns them."""
        self._end_answer()
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise SessionError("there is nothing to undo: send something first")
        taken = self.messages[users[-1] :]
        self._answer = None
        if self._mark and self._mark.n_messages == users[-1]:
            self._rewind()
        else:
            self._read_again(self.messages[: users[-1]])
        return taken

    def _rewind(self) -> None:
        """The cache and the messages as they were before the last user turn."""
        mark, self._mark = self._mark, None
        del self.messages[mark.n_messages :]
        self._sampler.recent.clear()
        self._sampler.recent.extend(mark.recent)
        if not self.cache.set_length(mark.n_tokens):
            self._try_to_read_again(self.messages)

    def _mend(self, answer: AnswerInProgress) -> None:
        """After an exception in the middle of an answer: the cache holds what is noted again, or is not used any more."""
        self._answer = None
        if not self.cache.set_length(self.cache.ledger.n_tokens):
            self._try_to_read_again(self.messages)
        answer.break_off()
        self.last = answer.stats

    def _settle(self) -> None:
        """Reads the conversation again if the cache may hold something else."""
        if self.cache.uncertain:
            answer = self._answer
            self._read_again(self.messages)
            self._answer = answer or self._answer

    def clear(self) -> None:
        """Forgets everything but the system prompt."""
        self._begin()

    def set_system(self, text: str | None) -> None:
        """Changes the system prompt and reads the conversation again under it. If that fails, everything stays as it was."""
        self._end_answer()
        before, self._system = self._system, text
        messages = list(self.messages)
        try:
            self._read_again(messages)
        except BaseException:
            self._system = before
            self._try_to_read_again(messages)
            raise

    @property
    def system(self) -> str | None:
        """The system prompt, None for the template's own default."""
        return self._system

    def owe(self, messages: Sequence[Message]) -> None:
        """These turns are the conversation; they are read when it goes on."""
        self._leave_answer()
        self._mark = None
        self.messages[:] = [dict(message) for message in messages]
        self.cache.doubt()

    def restore(self, messages: Sequence[Message]) -> None:
        """Forgets everything and reads these turns; the last may be a user turn, to be answered with answer()."""
        messages = [dict(message) for message in messages]
        self._begin()
        for message in messages:
            self.add_turn(message["role"], message["content"])

    def _read_again(self, messages: Sequence[Message]) -> None:
        """As restore, in the same conversation. Where it fails nothing of it is lost: it has these messages, and the next call tries again."""
        n_answers, messages = self.n_answers, [dict(message) for message in messages]
        try:
            self.restore(messages)
        except BaseException:
            self.owe(messages)
            raise
        finally:
            self.n_answers = n_answers

    def _try_to_read_again(self, messages: Sequence[Message]) -> None:
        """As _read_again, where another error is on its way already."""
        try:
            self._read_again(messages)
        except KvlocalError:
            pass

    # a copy of the cache that outlives the process

    @property
    def nexus(self) -> NexusTokens | None:
        """The Nexus tokens in use."""
        return self._reader.nexus

    def snapshot(self) -> Arrays:
        """What the answers to come depend on, after an answer and besides `cache.signature`, model, messages and system prompt; `resume` takes it.

        As BudgetedCache.snapshot, with what kvlocal.chat.state adds.
        """
        return with_state(self.cache.snapshot(), SessionState(self.n_answers, list(self._sampler.recent), self._mark))

    def snapshot_limits(self, n_text: int) -> Limits:
        """The type and the largest shape of each array of a `snapshot`, whose last dimension may be smaller. n_text: tokens there can be."""
        return limits(self.cache.snapshot_limits(n_text), self._sampler.recent.maxlen)

    def resume(self, messages: Sequence[Message], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from a `snapshot` that a session with the same signature, model and system prompt gave after these messages.

        Raises:
            SessionError: it does not fit; the session is then at its beginning.
        """
        self._reset()
        try:
            of_cache, state = without_state(arrays)
            for token in (*state.recent, *(state.mark.recent if state.mark else ())):
                self.model.check_token(token)
            self.cache.resume(of_cache)
        except (KvlocalError, LookupError, TypeError, ValueError, AttributeError) as error:
            self._begin()
            raise SessionError(f"this is no state of such a session ({error}): read the messages again") from error
        self.n_answers, self._mark = state.n_answers, state.mark
        self._sampler.recent.extend(state.recent)
        self.messages[:] = [dict(message) for message in messages]

    def set_sampling(self, sampling: SamplingParams) -> None:
        """Draws tokens in another way from the next answer on."""
        self._end_answer()
        sampler = Sampler(self.model, sampling)
        self._sampler.close()
        self._sampler = sampler

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are drawn."""
        return self._sampler.params

    @property
    def seed(self) -> int:
        """The seed in use, also when none was given."""
        return self._sampler.seed

    # what can be asked

    @property
    def kv(self) -> KvStats:
        """The cache in numbers."""
        return KvStats.of(self.cache)

    @property
    def seconds(self) -> Seconds:
        """Where the time went since the session was made."""
        return self.cache.seconds

    def segments(self) -> list[SegmentStats]:
        """What is left of each turn, in order."""
        return segment_stats(self.cache.ledger)

    def close(self) -> None:
        """Frees the cache. Closing twice is harmless."""
        self._leave_answer()
        self._sampler.close()
        self.cache.close()

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
