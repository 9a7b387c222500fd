"""Turns: the turns of a conversation that are given, taken back and read again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvlocal.cache.budgeted import BudgetedCache, Progress
from kvlocal.cache.fitting import fitted
from kvlocal.cache.second_read import SecondRead
from kvlocal.chat.answerer import Answerer
from kvlocal.chat.answering import AnswerInProgress
from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.messages import turns_of
from kvlocal.chat.opening import checked_opening, checked_template, repetition
from kvlocal.chat.state import Mark
from kvlocal.chat.turn_reader import TurnReader
from kvlocal.errors import KvlocalError
from kvlocal.interrupts import CtrlCWaits
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import Sampler
from kvlocal.llama.sequence_decoder import SequenceDecoder
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.answer import with_thought_inside
from kvlocal.template.markup import Message
from kvlocal.template.pieces import Piece


class Turns(Answerer):
    """A conversation as turns that are given, taken back and read again. ChatSession answers them.

    model: the weights; must outlive the session
    config: budget, policy and sampling
    progress: called with (tokens done, tokens in all) while a long text is read
    spare: cells beyond those that budget and stride need, for what is read in hold()
    n_outputs: tokens of a micro-batch whose logits are kept
    nexus: for the policies that need Nexus tokens: read behind every finished turn
    undo: keep what the last turn is taken back with at once, a copy of the cache among it; with an archive, what every turn is taken back with;
        without, what came before is read again
    make_context: makes the cells: Context, or what gives a slot beside others (kvlocal.llama.slots)
    begin: read the system prompt now, and not with the first turn; a session that goes on from a snapshot has read it already

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
        begin: bool = True,
    ):
        self.model = model
        self.config = config = fitted(model.path, config, model.placement)
        self.template = checked_template(model, config, nexus)
        self.messages: list[Message] = []
        self.last = None
        self.max_tokens = config.max_tokens
        self._system = config.system
        self._undo = undo
        # of the last user turn, until it has ended
        self._answer = None
        with ExitStack() as opened:
            self.cache = BudgetedCache(model, config, spare=spare, n_outputs=n_outputs, undo=undo, make_context=make_context)
            opened.callback(self.cache.close)
            needs = self.cache.policy.needs
            self._reader = TurnReader(self.cache, self.template, nexus if "nexus" in needs else None, progress)
            self._second_read = SecondRead(self.cache, repetition(model, self.template)) if config.idle and "reread" in needs else None
            self._sampler = Sampler(model, config.sampling)
            opened.callback(lambda sampler: sampler.close(), self._sampler)
            if begin:
                self._begin()
            else:
                self._reset()
                self.cache.doubt()
            opened.pop_all()

    def _begin(self) -> None:
        """An empty cache with the system prompt in it."""
        self._reader.read(self._reset())
        self.cache.ledger.n_reread = self.cache.ledger.n_tokens

    def _reset(self) -> Sequence[Piece]:
        """An empty cache; returns what a conversation begins with."""
        self._leave_answer()
        self._marks: list[Mark] = []
        self.prediction: npt.NDArray[np.float32] | None = None
        self.messages.clear()
        self.last = None
        self.n_answers = 0
        self._sampler.reset()
        pieces, n_system = checked_opening(self.model, self.config, self.template, self._system)
        self.cache.begin(n_system)
        return pieces

    def add_turn(self, role: str, content: str) -> None:
        """Appends a given turn, "user" or "assistant"; user turns and answers alternate. The last user turn may be answered with answer().

        An answer that is still on its way ends here.
        """
        self.add_messages([{"role": role, "content": content}])

    def add_messages(self, messages: Sequence[Message]) -> None:
        """Appends given messages in order, as add_turn does. What tools gave back follows the answer that called them, and stands for the turn of
        the user, which may follow it; what stands between two answers is read together.
        """
        for turn in turns_of(messages):
            self._add_turn([with_thought_inside(message) for message in turn])

    def _add_turn(self, turn: Sequence[Message]) -> None:
        """Appends an answer, or what stands between two."""
        self._end_answer()
        is_answer = turn[0]["role"] == "assistant"
        last = self.messages[-1]["role"] if self.messages else "assistant"
        _check_follows("user" if last == "tool" else last, turn[0]["role"])
        if turn[0]["role"] == "tool" and not (self.messages and "tool_calls" in self.messages[-1]):
            raise SessionError("no tool was called: add what it gave back behind an answer that calls it")
        for before, message in pairwise(turn):
            _check_follows(before["role"], message["role"])
        self.settle()
        self._answer = None if is_answer else AnswerInProgress(self._reader)
        history = self._history_for_template()
        if is_answer:
            pieces = self.template.given_answer(history, turn[0])
        else:
            self._note_mark()
            pieces = self.template.turn(history, turn)
        self.messages += turn
        try:
            if not is_answer and self._reader.nexus and self._reader.ends_with("assistant"):
                self._finish_turn()
            started = time.perf_counter()
            self._prompt = self._reader.read(pieces), time.perf_counter() - started
        except BaseException:
            self._take_back(len(turn))
            raise
        self.prediction = self.cache.context.logits()
        self.n_answers += is_answer

    def _note_mark(self) -> None:
        """What the conversation is now can be had again, as long as the cache has the way back to it."""
        self.cache.mark()
        now = Mark(self.cache.ledger.n_tokens, len(self.messages), list(self._sampler.recent))
        there = {*self.cache.marked}
        self._marks = [mark for mark in (*self._marks, now) if mark.n_tokens in there]

    def _take_back(self, n_messages: int) -> None:
        """A turn of so many messages that could not be read to its end is as if it had not been given."""
        self._answer = None
        with suppress(KvlocalError):
            self._go_back(len(self.messages) - n_messages)

    def _history_for_template(self, n: int | None = None) -> list[Message]:
        """What the template has to know of the first n messages, of all if None."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        # the markup depends on no more than the last turns
        return system + self.messages[:n][-2:]

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
        self.settle()
        self.cache.compress()

    # the way back

    def undo(self, n_turns: int = 1) -> list[Message]:
        """Takes the last turns of the user and what follows them out of the conversation and the cache, and returns all these messages."""
        self._end_answer()
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise SessionError("there is nothing to undo: send something first")
        if not 1 <= n_turns <= len(users):
            raise SessionError(f"{n_turns} turns cannot be taken back: give 1 to {len(users)}")
        taken = self.messages[users[-n_turns] :]
        self._answer = None
        self._go_back(users[-n_turns])
        return taken

    def go_back_to(self, n_messages: int) -> int:
        """Takes back what follows the first n messages, and more where the way back goes only further: to the last mark, or to the beginning. Returns
        how many it has then, which are to be gone on with.
        """
        self._end_answer()
        if n_messages < len(self.messages):
            self._answer = None
            if not any(self._rewind(mark.n_messages) for mark in reversed(self._marks) if mark.n_messages <= n_messages):
                n_answers = self.n_answers
                self._begin()
                self.n_answers = n_answers
        return len(self.messages)

    def _go_back(self, n_messages: int) -> None:
        """The conversation is its first n_messages again."""
        if not self._rewind(n_messages):
            self._read_again(self.messages[:n_messages])

    def _rewind(self, n_messages: int) -> bool:
        """Cache and messages as they were when there were so many. False without a mark there, or where the cache cannot bring it back; all that is
        certain then is the messages, which are as they were.
        """
        at = next((i for i, mark in enumerate(self._marks) if mark.n_messages == n_messages), None)
        with CtrlCWaits():
            if at is None or not self.cache.set_length(self._marks[at].n_tokens):
                return False
            self._sampler.recent.clear()
            self._sampler.recent.extend(self._marks[at].recent)
            del self.messages[n_messages:], self._marks[at:]
        return True

    def settle(self) -> None:
        """Reads the conversation again if the cache may hold something else."""
        if self.cache.uncertain:
            answer = self._answer
            self._read_again(self.messages)
            self._answer = answer or self._answer

    def _read_again(self, messages: Sequence[Message]) -> None:
        """The conversation is these messages: it goes back to its last mark among those it has already and reads the others, or all of them without a
        mark. Where that fails nothing is lost: it has these messages, and the next call tries again.
        """
        n_answers, messages = self.n_answers, [dict(message) for message in messages]
        try:
            self._leave_answer()
            n_known = _n_common(self.messages, messages)
            if any(self._rewind(mark.n_messages) for mark in reversed(self._marks) if mark.n_messages <= n_known):
                self.add_messages(messages[len(self.messages) :])
            else:
                self.restore(messages)
        except BaseException:
            self.owe(messages)
            raise
        finally:
            self.n_answers = n_answers

    def _try_to_read_again(self, messages: Sequence[Message]) -> None:
        """As _read_again, where another error is on its way already."""
        with suppress(KvlocalError):
            self._read_again(messages)

    def restore(self, messages: Sequence[Message]) -> None:
        """Forgets everything and reads these turns; the last may be a user turn, to be answered with answer()."""
        messages = [dict(message) for message in messages]
        self._begin()
        self.add_messages(messages)

    def owe(self, messages: Sequence[Message]) -> None:
        """These turns are the conversation; they are read when it goes on."""
        self._leave_answer()
        n_known = _n_common(self.messages, messages)
        self._marks = [mark for mark in self._marks if mark.n_messages <= n_known]
        self.messages[:] = [dict(message) for message in messages]
        self.cache.doubt()

    def clear(self) -> None:
        """Forgets everything but the system prompt."""
        self._begin()

    def set_system(self, text: str | None) -> None:
        """Changes the system prompt and reads the conversation again under it. If that fails, everything stays as it was."""
        self._end_answer()
        before, self._system = self._system, text
        messages = list(self.messages)
        # what comes before them is another
        self._marks.clear()
        try:
            self._read_again(messages)
        except BaseException:
            self._system = before
            self._marks.clear()
            self._try_to_read_again(messages)
            raise

    @property
    def system(self) -> str | None:
        """The system prompt, None for the template's own default."""
        return self._system


def _check_follows(last: str, role: str) -> None:
    """Whether a message of this role can come behind one of the role `last`."""
    wanted = {"assistant": ("user", "tool"), "tool": ("tool", "user", "assistant")}.get(last, ("assistant",))
    if role not in wanted:
        raise SessionError(f"after a turn of the {last} comes one of the {wanted[0]}, not of {role!r}")


def _n_common(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many messages two conversations begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
