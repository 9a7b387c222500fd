"""ChatSession: one conversation inside a fixed KV budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvlocal.cache.budgeted import BudgetedCache, CacheConfig, CacheError, Passage, Progress
from kvlocal.cache.compression import Seconds
from kvlocal.cache.second_read import INSTRUCTION, SecondRead
from kvlocal.errors import KvlocalError
from kvlocal.llama.engine import Context, Model
from kvlocal.llama.sampling import Sampler, SamplingParams
from kvlocal.nexus.allotment import n_nexus
from kvlocal.nexus.tokens import LONG_TEXT, NexusTokens
from kvlocal.template.chat_template import ChatTemplate, Piece
from kvlocal.template.textstream import TextStream, pieces_of

Message = dict[str, str]

# what an instruction to the model comes behind, for templates that begin a conversation in another way
_EXCHANGE = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]


class SessionError(CacheError):
    """The session cannot do this, now or with this configuration."""


@dataclass(frozen=True)
class SessionConfig(CacheConfig):
    """How a conversation is kept: what CacheConfig says, in which the system prompt always stays, and

    idle: read finished turns a second time, for the policies that need it
    system: system prompt; None for the template's own default
    sampling: how the next token is drawn
    max_tokens: the longest answer, in tokens

    Raises:
        CacheError: a value is out of range.
    """

    idle: bool = True
    system: str | None = None
    sampling: SamplingParams = SamplingParams()
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise SessionError(f"max_tokens is {self.max_tokens}: it must be at least 1")


@dataclass(frozen=True)
class KvStats:
    """The cache in numbers, in cells of each layer and head.

    budget, used, capacity: what it may hold after a compression, holds, and was allocated for
    peak_cells: the most it ever held
    history_tokens: tokens of the whole conversation
    compressions: how often cells were removed
    evicted: cells removed so far
    next_position: where the next token goes
    nexus: of the cells it holds, those of Nexus tokens, mean over layers and heads
    rotations: how often the keys were moved back to low positions
    """

    budget: int
    used: int
    capacity: int
    peak_cells: int
    history_tokens: int
    compressions: int
    evicted: int
    next_position: int
    nexus: float
    rotations: int

    def report(self) -> dict[str, float]:
        """What is told with a result."""
        return {name: getattr(self, name) for name in REPORTED}


# the numbers of KvStats that are told with a result
REPORTED = ("budget", "peak_cells", "history_tokens", "compressions", "evicted", "nexus")


@dataclass(frozen=True)
class TurnStats:
    """The last answer in numbers.

    stop_reason: "end" by itself, "length" at max_tokens, "stopped" by the caller
    drawn: its tokens, with the one that ended it
    """

    prompt_tokens: int
    answer_tokens: int
    prompt_seconds: float
    answer_seconds: float
    stop_reason: Literal["end", "length", "stopped"]
    drawn: Sequence[int]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer, 0 for an empty one."""
        return self.answer_tokens / self.answer_seconds if self.answer_seconds > 0 else 0.0


@dataclass(frozen=True)
class SegmentStats:
    """What is left of one segment. n_cells: mean over layers and heads; n_cells_min: the smallest of them."""

    role: str
    turn: int
    n_tokens: int
    n_cells: float
    n_cells_min: int
    pinned: bool
    text: str


@dataclass(frozen=True)
class _Mark:
    """Where the conversation stood before the last user turn, to go back to.

    recent: tokens the repeat penalty looked at
    """

    n_tokens: int
    n_messages: int
    recent: Sequence[int]


@dataclass(eq=False)
class _OpenTurn:
    """A user turn from the time it is read until its answer has ended. There is one at a time; what belongs to an earlier one has no say.

    stopped: its answer is to end
    message: the answer as far as it came, None before it is begun
    fed: the tokens of the answer that were evaluated
    drawn: those that were drawn, with the one that ended it
    started: when the answer began
    """

    stopped: bool = False
    message: Message | None = None
    fed: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    started: float = 0.0


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
    n_outputs: tokens of a micro-batch whose logits are kept; read_answer() needs them all
    nexus: for the policies that need Nexus tokens: read behind every finished turn
    undo: keep what the last turn is taken back with at once, a copy of the cache among it; without, what came before is read again
    make_context: makes the cells: Context, or what gives a stream beside others (kvlocal.llama.slots)

    cache: the tokens of the conversation (kvlocal.cache.budgeted)
    messages: the conversation, {"role", "content"}, without the system prompt; an answer that was stopped is there as far as it came
    last: the last answer in numbers, None before the first
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
        make_context: Callable[..., Context] = Context,
    ):
        self.model = model
        self.config = config
        self.template = ChatTemplate.from_model(model)
        self.messages: list[Message] = []
        self.last: TurnStats | None = None
        self.max_tokens = config.max_tokens
        self._progress = progress
        self._system = config.system
        self._undo = undo
        self._turn: _OpenTurn | None = None
        with ExitStack() as opened:
            self.cache = BudgetedCache(model, config, spare=spare, n_outputs=n_outputs, undo=undo, make_context=make_context)
            opened.callback(self.cache.close)
            needs = self.cache.policy.needs
            if "nexus" in needs and nexus is None:
                raise SessionError(f"the policy {config.policy} needs Nexus tokens for {model.path.name}: give a Nexus file or choose another policy")
            self._nexus = nexus if "nexus" in needs else None
            self._second_read = SecondRead(self.cache, self._instruction()) if config.idle and "reread" in needs else None
            self._sampler = Sampler(model, config.sampling)
            opened.callback(lambda sampler: sampler.close(), self._sampler)
            self._begin()
            opened.pop_all()

    def _instruction(self) -> npt.NDArray[np.int32]:
        """The tokens of a user turn that asks for a repetition."""
        return np.concatenate([tokens for _, tokens in self.template.tokens(self.model, self.template.user_turn(_EXCHANGE, INSTRUCTION))])

    # what is in the cache

    def _begin(self) -> None:
        """An empty cache with the system prompt in it."""
        self._read(self._reset())
        self.cache.ledger.n_reread = self.cache.ledger.n_tokens

    def _reset(self) -> Sequence[Piece]:
        """An empty cache; returns what a conversation begins with."""
        self._turn: _OpenTurn | None = None
        self._mark: _Mark | None = None
        self._prediction: npt.NDArray[np.float32] | None = None  # logits after the last turn that was read
        self.messages.clear()
        self.last = None
        self.n_answers = 0
        self._sampler.reset()
        pieces = self.template.prefix(self._system)
        n_system = sum(len(tokens) for _, tokens in self.template.tokens(self.model, pieces))
        self.cache.begin(n_system)
        least = self.cache.least_budget(n_system)
        if least > self.budget:
            raise SessionError(
                f"the system prompt takes {n_system} tokens, which always stay, and leaves too little of a budget of {self.budget}: "
                f"shorten it or give a budget of at least {least}"
            )
        return pieces

    @property
    def budget(self) -> int:
        """The most cells of each layer and head after a compression."""
        return self.cache.budget

    def _parts(self, pieces: Sequence[Piece]) -> list[Passage]:
        tokens = self.template.tokens(self.model, pieces)
        return [
            Passage(piece.role, ids, piece.text if piece.kind == "content" else "") for piece, (_, ids) in zip(pieces, tokens, strict=True)
        ]

    def _read(self, pieces: Sequence[Piece]) -> int:
        """Evaluates pieces, each in a segment of its role; returns the number of tokens."""
        parts = self._parts(pieces)
        if self._ends_with("nexus"):
            # the end of the last answer was read before its Nexus tokens
            parts = parts[next(i for i, piece in enumerate(pieces) if piece.role != "assistant") :]
        return self._evaluate(parts)

    def _ends_with(self, role: str) -> bool:
        """Whether the last segment is of that role."""
        segments = self.cache.ledger.segments
        return bool(segments) and segments[-1].role == role

    def finish_turn(self) -> None:
        """Reads what ends the last answer, and Nexus tokens behind it, if the policy has them: now instead of with the next user turn."""
        self._end_answer()
        if self.cache.uncertain or not self._nexus or not self._ends_with("assistant") or self.messages[-1]["role"] != "assistant":
            return
        n_tokens = self.cache.ledger.n_tokens
        try:
            self._finish_turn()
        except BaseException:
            self.cache.cut(n_tokens)
            raise

    def _finish_turn(self) -> None:
        self._evaluate(self._parts(self.template.close_assistant(self._history_for_template(), self.messages[-1]["content"])))
        self._read_nexus()

    def _read_nexus(self) -> None:
        """Reads Nexus tokens for what came since the last ones: a user's turn and the answer to it, or a block of a long text."""
        ledger, policy = self.cache.ledger, self.cache.policy
        start = max((segment.end for segment in ledger.segments if segment.role in ("system", "nexus")), default=0)
        ratio = policy.compression if self.config.ratio is None else self.config.ratio
        k = n_nexus(ledger.n_tokens - start, ratio, policy.share, self._nexus.file.k)
        self.cache.append_vectors(self._nexus.vectors(k), "nexus", self._nexus.adapter)

    def _evaluate(self, parts: Sequence[Passage]) -> int:
        """Evaluates parts, with Nexus tokens where a long text is divided; returns how many tokens they have."""
        total, done = sum(len(part.tokens) for part in parts), 0

        def progress(n: int, _: int) -> None:
            if self._progress and total > self.cache.context.n_ubatch:
                self._progress(done + n, total)

        first, *others = self._stretches(parts) if self._nexus else [parts]
        done += self.cache.read(first, progress)
        for stretch in others:
            self._read_nexus()
            done += self.cache.read(stretch, progress)
        return total

    def _stretches(self, parts: Sequence[Passage]) -> list[list[Passage]]:
        """The parts, divided where Nexus tokens come: at ends of blocks in texts of the user that are long."""
        stretches: list[list[Passage]] = [[]]
        for part in parts:
            blocks = [part.tokens]
            if part.role == "user" and len(part.tokens) > LONG_TEXT.max_block:
                ends = LONG_TEXT.split([self.model.token_bytes(token) for token in part.tokens.tolist()], None)
                blocks = np.split(part.tokens, ends[:-1])
            stretches[-1].append(part._replace(tokens=blocks[0]))
            stretches += [[part._replace(tokens=block)] for block in blocks[1:]]
        return stretches

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
        self._turn = _OpenTurn() if role == "user" else None
        if role == "user":
            if self._undo:
                self._mark = _Mark(self.cache.ledger.n_tokens, len(self.messages), list(self._sampler.recent))
            self.cache.mark()
            pieces = self.template.user_turn(self._history_for_template(), content)
        else:
            pieces = self.template.given_assistant(self._history_for_template(), content)
        self.messages.append({"role": role, "content": content})
        try:
            if role == "user" and self._nexus and self._ends_with("assistant"):
                self._finish_turn()
            self._prompt_tokens = self._read_timed(pieces)
        except BaseException:
            self._take_back(role)
            raise
        self._prediction = self.cache.context.logits()
        self.n_answers += role == "assistant"

    def _read_timed(self, pieces: Sequence[Piece]) -> int:
        started = time.perf_counter()
        n = self._read(pieces)
        self._prompt_seconds = time.perf_counter() - started
        return n

    def _take_back(self, role: str) -> None:
        """A turn that could not be read to its end is as if it had not been given."""
        self._turn = None
        if role == "user" and self._mark:
            self._rewind()
        else:
            self._try_to_read_again(self.messages[:-1])

    def _history_for_template(self) -> list[Message]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        # the markup depends on no more than the last turns
        return system + self.messages[-2:]

    def answer(self) -> Iterator[str]:
        """Generates the answer to the last user turn: yields its text as it comes.

        The answer is part of the conversation from this call on. Closing the iterator, stop(), or an exception inside it, ends the answer; what
        there is of it stays. So does the next call that changes the conversation; the iterator raises SessionError after that.
        """
        self._settle()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise SessionError("there is no user turn to answer: send one first")
        turn = self._turn = self._turn or _OpenTurn()
        turn.message, turn.started = {"role": "assistant", "content": ""}, time.perf_counter()
        self.messages.append(turn.message)
        self._sampler.begin(self.n_answers)
        self.n_answers += 1
        return self._generate(turn)

    def _generate(self, turn: _OpenTurn) -> Iterator[str]:
        stream = TextStream(self.template.stop_strings)
        self._check_current(turn)
        turn.started = time.perf_counter()
        reason: Literal["end", "length", "stopped"] = "stopped"
        try:
            while not turn.stopped:
                if len(turn.fed) >= self.max_tokens:
                    reason = "length"
                    break
                sampling = time.perf_counter()
                token = self._sampler.sample(self.cache.context)
                turn.drawn.append(token)
                self.seconds.sample += time.perf_counter() - sampling
                if token in self.model.end_tokens:
                    reason = "end"
                    break
                self.cache.append(np.array([token], np.int32), "decode")
                turn.fed.append(token)
                text = stream.push(self.model.token_bytes(token))
                if text:
                    turn.message["content"] += text
                    yield text
                    self._check_current(turn)
                if stream.stopped:
                    reason = "end"
                    break
            rest = stream.flush(cut=not self._ended(turn.drawn))
            turn.message["content"] += rest
            self._end_answer(reason)
        except GeneratorExit:
            if self._turn is turn:
                self._end_answer()
            raise
        except (Exception, KeyboardInterrupt):
            if self._turn is turn:
                self._mend(turn)
            raise
        if rest:
            yield rest

    def _check_current(self, turn: _OpenTurn) -> None:
        if self._turn is not turn:
            raise SessionError("this answer has ended, as the conversation went on without it: ask again with regenerate() or send()")

    def _ended(self, drawn: Sequence[int]) -> bool:
        """Whether these tokens are those of an answer that the model ended by a token."""
        return bool(drawn) and drawn[-1] in self.model.end_tokens

    def _end_answer(self, reason: Literal["end", "length", "stopped"] = "stopped") -> None:
        """An answer that is on its way ends as far as it came."""
        turn = self._turn
        if turn is None or turn.message is None:
            return
        self._turn = None
        n = len(turn.fed)
        if not self._ended(turn.drawn):
            n = self._keep_said(turn.fed, turn.message["content"])
        self._close_answer(turn, n, reason)

    def _close_answer(self, turn: _OpenTurn, n_tokens: int, reason: Literal["end", "length", "stopped"]) -> None:
        self.cache.describe(turn.message["content"])
        self.last = TurnStats(self._prompt_tokens, n_tokens, self._prompt_seconds, time.perf_counter() - turn.started, reason, turn.drawn)

    def _keep_said(self, fed: Sequence[int], content: str) -> int:
        """Takes tokens at the end of an answer out of the cache that say what is not in its text: a stop string, or the beginning of a character
        or of a stop string. Returns how many tokens the answer has then.

        fed: the tokens of the answer, the last that were evaluated
        """
        n, n_characters = pieces_of([self.model.token_bytes(token) for token in fed], content)
        n_drop = len(fed) - n
        if not n_drop or self.cache.uncertain:
            return len(fed)
        for _ in range(min(n_drop, len(self._sampler.recent))):
            self._sampler.recent.pop()
        if not self.cache.cut(self.cache.ledger.n_tokens - n_drop):
            return n
        # a token may say the end of the answer and the beginning of what is left out
        rest = content[n_characters:]
        if rest:
            (part,) = self._parts([Piece("assistant", rest, "content", before=content[:n_characters] or "a")])
            n += self.cache.read([part])
        return n

    def add_answer(self, content: str, drawn: Sequence[int]) -> None:
        """As add_turn("assistant", content), for an answer that was drawn as these tokens (TurnStats.drawn): they are evaluated one by one, so
        that the cache becomes what it was then, and not only nearly so. If they are not the tokens of that text, it is added as any other.
        """
        self._end_answer()
        self._settle()
        stream = TextStream(self.template.stop_strings)
        if max(drawn, default=0) >= self.model.n_vocab or min(drawn, default=0) < 0:
            drawn = ()
        fed = [token for token in drawn if token not in self.model.end_tokens]
        text = "".join(stream.push(self.model.token_bytes(token)) for token in fed) + stream.flush(cut=not self._ended(drawn))
        if text != content or not self.messages or self.messages[-1]["role"] != "user":
            return self.add_turn("assistant", content)
        self._turn = None
        self.messages.append({"role": "assistant", "content": content})
        try:
            for token in drawn:
                self._sampler.accept(token)
                if token not in self.model.end_tokens:
                    self.cache.append(np.array([token], np.int32), "decode")
            if not self._ended(drawn):
                self._keep_said(fed, content)
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

        What is read inside must fit into the free and the spare cells. A user turn from outside can be followed by read_answer() inside, but not
        by answer() any more.
        """
        self._end_answer()
        self._settle()
        messages, last, mark, prediction, turn = list(self.messages), self.last, self._mark, self._prediction, self._turn
        n_answers = self.n_answers
        self._mark = None
        try:
            with self.cache.hold():
                yield
        finally:
            self._mark, self.last, self._prediction, self._turn, self.messages[:] = mark, last, prediction, turn, messages
            self.n_answers = n_answers

    def read_answer(self, content: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Reads a given answer to the last user turn and returns its tokens, int32 [n], and what the model predicted, float32 [n, n_vocab].

        Row i holds the logits from which token i would have been drawn. Needs n_outputs of at least n_ubatch.
        """
        parts = self._parts(self.template.given_assistant(self._history_for_template(), content))
        self.messages.append({"role": "assistant", "content": content})
        self.cache.ledger.begin_segment("assistant")
        rows, tokens = [], []
        for part in parts:
            ids = part.tokens
            if part.text:
                rows.append(self._prediction[None])
            while len(ids):
                chunk, ids = np.split(ids, [self.cache.room])
                self.cache.append(chunk, logits="all" if part.text else "last")
                self._prediction = self.cache.context.logits()
                if part.text:
                    tokens.append(chunk)
                    rows.append(self.cache.context.logits_all())
        return np.concatenate(tokens), np.concatenate(rows)[:-1]

    def stop(self) -> None:
        """Ends the answer that is on its way after its current token, or before its first one while the turn is still read; safe in a signal
        handler."""
        turn = self._turn
        if turn is not None:
            turn.stopped = True

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
        self._turn = None
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
        if not self.cache.cut(mark.n_tokens):
            self._try_to_read_again(self.messages)

    def _mend(self, turn: _OpenTurn) -> None:
        """After an exception in the middle of an answer: the cache holds what is noted again, or is not used any more."""
        self._turn = None
        if not self.cache.cut(self.cache.ledger.n_tokens):
            self._try_to_read_again(self.messages)
        self._close_answer(turn, len(turn.fed), "stopped")

    def _settle(self) -> None:
        """Reads the conversation again if the cache may hold something else."""
        if self.cache.uncertain:
            turn = self._turn
            self._read_again(self.messages)
            self._turn = turn or self._turn

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
            self._turn = self._mark = None
            self.messages[:] = messages
            self.cache.doubt()
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
    def signature(self) -> dict[str, Any]:
        """All settings that decide what is in the cache besides the model, the messages and the system prompt, as JSON can hold them."""
        return self.cache.signature

    @property
    def nexus(self) -> NexusTokens | None:
        """The Nexus tokens in use."""
        return self._nexus

    def snapshot(self) -> dict[str, npt.NDArray[np.generic]]:
        """What the answers to come depend on, after an answer and besides `signature`, model, messages and system prompt; `resume` takes it.

        As BudgetedCache.snapshot, with one number more in numbers, n_answers, and in checkpoint.numbers, the messages there were; and recent and
        checkpoint.recent: int32 [n], tokens the repeat penalty looks at
        """
        arrays = self.cache.snapshot()
        arrays["numbers"] = np.append(arrays["numbers"], self.n_answers)
        arrays["recent"] = np.array(self._sampler.recent, np.int32)
        if self._mark and "checkpoint.numbers" in arrays:
            arrays["checkpoint.numbers"] = np.append(arrays["checkpoint.numbers"], self._mark.n_messages)
            arrays["checkpoint.recent"] = np.array(self._mark.recent, np.int32)
        return arrays

    def snapshot_limits(self, n_text: int) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
        """The type and the largest shape of each array of a `snapshot`, whose last dimension may be smaller. n_text: tokens there can be."""
        recent = ("<i4", (self._sampler.recent.maxlen,))
        numbers = {"numbers": ("<i8", (4,)), "checkpoint.numbers": ("<i8", (2,))}
        return self.cache.snapshot_limits(n_text) | numbers | {"recent": recent, "checkpoint.recent": recent}

    def resume(self, messages: Sequence[Message], arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Goes on from a `snapshot` that a session with the same signature, model and system prompt gave after these messages.

        Raises:
            SessionError: it does not fit; the session is then at its beginning.
        """
        self._reset()
        try:
            *numbers, self.n_answers = arrays["numbers"].tolist()
            of_cache = {**arrays, "numbers": np.array(numbers, np.int64)}
            mark = None
            if "checkpoint.numbers" in arrays:
                n_tokens, n_messages = arrays["checkpoint.numbers"].tolist()
                mark = _Mark(n_tokens, n_messages, self._tokens_of(arrays["checkpoint.recent"]))
                of_cache["checkpoint.numbers"] = np.array([n_tokens], np.int64)
            recent = self._tokens_of(arrays["recent"])
            self.cache.resume(of_cache)
            self._sampler.recent.extend(recent)
            self._mark = mark
        except (KvlocalError, LookupError, TypeError, ValueError, AttributeError) as error:
            self._begin()
            raise SessionError(f"this is no state of such a session ({error}): read the messages again") from error
        self.messages[:] = [dict(message) for message in messages]

    def _tokens_of(self, array: npt.NDArray[np.generic]) -> list[int]:
        tokens = array.tolist()
        for token in tokens:
            self.model.check_token(token)
        return tokens

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
        cache, ledger = self.cache, self.cache.ledger
        return KvStats(
            cache.target,
            ledger.n_cells,
            cache.context.n_cells,
            cache.peak,
            ledger.n_tokens - ledger.n_nexus,
            cache.compressor.compressions,
            ledger.n_tokens - ledger.n_cells,
            ledger.next_position,
            float(ledger.nexus().mean(axis=(0, 1)).sum()) if self._nexus else 0.0,
            cache.compressor.rotations,
        )

    @property
    def seconds(self) -> Seconds:
        """Where the time went since the session was made."""
        return self.cache.seconds

    def segments(self) -> list[SegmentStats]:
        """What is left of each turn, in order."""
        ledger = self.cache.ledger
        counts = ledger.cells_per_segment().reshape(len(ledger.segments), -1)
        stats, turn, before = [], 0, ""
        for segment, mean, least in zip(ledger.segments, counts.mean(axis=1).tolist(), counts.min(axis=1).tolist(), strict=True):
            # Nexus tokens divide a long text
            turn += segment.role == "user" != before
            before = before if segment.role == "nexus" else segment.role
            n_tokens, pinned = segment.end - segment.start, segment.end <= ledger.n_pinned
            stats.append(SegmentStats(segment.role, turn, n_tokens, mean, least, pinned, segment.text))
        return stats

    def close(self) -> None:
        """Frees the cache. Closing twice is harmless."""
        self._turn = None
        self._sampler.close()
        self.cache.close()

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
