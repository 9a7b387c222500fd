"""ChatSession: one conversation inside a fixed KV budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from kvlocal import policies
from kvlocal.cache.compression import Compressor, Positions, Seconds
from kvlocal.cache.ledger import NEXUS, Ledger
from kvlocal.cache.rollback import taken_back
from kvlocal.cache.score_sources import Observer
from kvlocal.cache.second_read import SecondRead
from kvlocal.errors import KvlocalError
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.engine import Context, Model, Outputs
from kvlocal.llama.sampling import Sampler, SamplingParams
from kvlocal.nexus.allotment import n_nexus
from kvlocal.nexus.tokens import LONG_TEXT, NexusTokens
from kvlocal.template.chat_template import ChatTemplate, Piece, Role
from kvlocal.template.textstream import TextStream

Message = dict[str, str]
Progress = Callable[[int, int], None]

DEFAULT_BUDGET = 1024
DEFAULT_FULL = 8192

_EXCERPT = 60  # characters of a segment's text that are kept for showing


class SessionError(KvlocalError):
    """The session cannot do this, now or with this configuration."""


@dataclass(frozen=True)
class SessionConfig:
    """How a conversation is kept.

    budget: cells each layer and head holds after a compression, DEFAULT_BUDGET if None; for the policy "full", all there ever are, and if
        None as many as the model was trained for, up to DEFAULT_FULL
    ratio: the share of the history to remove, 0 to 1: the budget grows with the conversation, (1 - ratio) of its tokens, up to `budget`, which
        is then as large as for "full" if None
    policy, policy_args: what to keep (kvlocal.policies), and its hyper-parameters
    positions: where kept keys are rotated to (kvlocal.cache.compression.Compressor)
    idle: read finished turns a second time, for the policies that need it
    stride: the cache may grow by this many cells before it is compressed again
    window: the most recent cells, which always stay, and whose queries score the others
    n_sink: the first cells, which always stay, as the system prompt does
    system: system prompt; None for the template's own default
    type_k, type_v: types of the cache, of kvlocal.llama.engine.KV_TYPES
    n_ubatch: tokens evaluated at once
    n_threads: threads; None for all cores
    sampling: how the next token is drawn
    max_tokens: the longest answer, in tokens
    """

    budget: int | None = None
    ratio: float | None = None
    policy: str = policies.DEFAULT_POLICY
    policy_args: Mapping[str, Any] = field(default_factory=dict)
    positions: Positions = "auto"
    idle: bool = True
    stride: int = 128
    window: int = 16
    n_sink: int = 4
    system: str | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    n_ubatch: int = 256
    n_threads: int | None = None
    sampling: SamplingParams = SamplingParams()
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("budget", "stride", "window", "n_ubatch", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SessionError(f"{name} is {value}: it must be at least 1")
        if self.n_sink < 0:
            raise SessionError(f"n_sink is {self.n_sink}: it must be at least 0")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise SessionError(f"the ratio is {self.ratio}: it must be at least 0 and below 1, the share of the history to remove")
        if self.positions not in get_args(Positions):
            raise SessionError(f"the positions are {self.positions!r}: they must be one of {', '.join(get_args(Positions))}")
        if self.window > self.n_ubatch:
            raise SessionError(f"the window of {self.window} must not be larger than the micro-batch of {self.n_ubatch}: make it smaller")
        if self.budget is not None and self.budget < self.least_budget:
            raise SessionError(f"a budget of {self.budget} cells is too small: give at least {self.least_budget}")

    @property
    def least_budget(self) -> int:
        """The smallest budget there can be."""
        return 2 * self.window + self.n_sink


class Allocation(NamedTuple):
    """What a configuration needs for a model.

    budget: the most cells of each layer and head after a compression
    n_cells: cells that are allocated
    evicts: whether cells are ever removed
    """

    budget: int
    n_cells: int
    evicts: bool


def allocation(config: SessionConfig, n_ctx_train: int) -> Allocation:
    """How large a cache is made for a model that was trained on so many positions; a budget that is too large for it is left as it is."""
    evicts = policies.make(config.policy, config.policy_args).evicts
    slack = config.stride if evicts else 0
    default = DEFAULT_BUDGET if evicts and config.ratio is None else DEFAULT_FULL
    budget = config.budget or min(default, n_ctx_train - slack)
    return Allocation(budget, budget + slack, evicts)


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


@dataclass
class _Checkpoint:
    """The state before the last user turn, to go back to.

    The tail of the cache is simply cut off as long as nothing was removed since; before the first removal the cache is copied. The query ring
    is overwritten from the start, so it is copied at once.

    recent: tokens the repeat penalty looked at
    """

    n_tokens: int
    n_messages: int
    ring: npt.NDArray[np.uint8] | None
    recent: Sequence[int]
    state: npt.NDArray[np.uint8] | None = None
    ledger: Ledger | None = None


class ChatSession:
    """A conversation that never ends, in a cache that never grows.

    Every token is evaluated once. The cache is compressed when it exceeds the budget by the stride, also in the middle of a long prompt or
    answer; the system prompt and the sinks always stay. When positions come near the end of the trained context, kept keys are rotated back
    to low positions and the conversation goes on.

    model: the weights; must outlive the session
    config: budget, policy and sampling
    progress: called with (tokens done, tokens in all) while a long text is read
    spare: cells beyond those that budget and stride need, for what is read in hold()
    n_outputs: tokens of a micro-batch whose logits are kept; read_answer() needs them all
    nexus: for the policies that need Nexus tokens: read behind every finished turn
    undo: keep what the last turn is taken back with at once, a copy of the cache among it; without, what came before is read again
    make_context: makes the cache: Context, or what gives a stream beside others (kvlocal.llama.slots)

    budget: the most cells of each layer and head after a compression
    messages: the conversation, {"role", "content"}, without the system prompt; an answer that was stopped is there as far as it came
    last: the last answer in numbers, None before the first
    max_tokens: the longest answer; may be set
    n_answers: answers so far, given ones and those that were taken back too; the random numbers of the next one depend on it; may be set

    Raises SessionError if budget, system prompt and model do not go together, EngineError or NativeError if the model cannot be run or
    compressed.
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
        self._policy = policies.make(config.policy, config.policy_args)
        wants_nexus = "nexus" in self._policy.needs
        if wants_nexus and nexus is None:
            raise SessionError(f"the policy {config.policy} needs Nexus tokens for {model.path.name}: give a Nexus file or choose another policy")
        self._nexus = nexus if wants_nexus else None
        self.budget, self._capacity, _ = allocation(config, model.n_ctx_train)
        if self._capacity > model.n_ctx_train:
            raise SessionError(
                f"a budget of {self.budget} cells is too large for a model trained on {model.n_ctx_train} positions: "
                f"give at most {model.n_ctx_train - (self._capacity - self.budget)}"
            )
        self._context = make_context(
            model,
            # llama.cpp cuts the sliding-window cache to the size of the other one, and it has to hold the window beside a micro-batch
            n_cells=max(self._capacity + spare, model.n_swa + config.n_ubatch if model.n_swa else 0),
            n_ubatch=config.n_ubatch,
            type_k=config.type_k,
            type_v=config.type_v,
            n_threads=config.n_threads,
            n_outputs=n_outputs,
        )
        self._native = NativeCache(self._context.pointer, self._context.seq, self._context.call)
        self._layout = self._native.layout()
        self._observer = Observer(self._native, self._layout, self._policy, config.window, self._context.n_ubatch, model.token_bytes)
        self._compressor = Compressor(
            self._native,
            self._layout,
            self._observer,
            self._policy,
            self.budget,
            config.ratio,
            config.stride,
            config.window,
            config.positions,
            config.n_ubatch,
            model.n_ctx_train,
            model.n_swa if self._layout.is_swa else 0,
            before=self._save_checkpoint,
        )
        # for a copy of the cache (see _Checkpoint), taken now so that memory stays what it is from the first turn on
        self._copy = np.full(_copy_bytes(self._context) if undo and self._policy.evicts else 0, 0, np.uint8)
        self._undo = undo
        rereads = config.idle and "reread" in self._policy.needs
        self._second_read = SecondRead(model, self._context, self._native, self._compressor, self.template) if rereads else None
        self._sampler = Sampler(model, config.sampling)
        self._spare = spare
        self._stop = False
        self._begin()

    # what is in the cache

    def _begin(self) -> None:
        """An empty cache with the system prompt in it."""
        self._read(self._reset())
        self._ledger.n_reread = self._ledger.n_tokens

    def _reset(self) -> Sequence[Piece]:
        """An empty cache; returns what a conversation begins with."""
        self._context.clear()
        self._checkpoint: _Checkpoint | None = None
        self._prediction: npt.NDArray[np.float32] | None = None  # logits after the last turn that was read
        self._peak = 0
        self.messages.clear()
        self.last = None
        self.n_answers = 0
        self._sampler.reset()
        self._compressor.compressions = self._compressor.rotations = 0
        pieces = self.template.prefix(self._system)
        n_system = sum(len(tokens) for _, tokens in self.template.tokens(self.model, pieces))
        self._n_pinned = max(self.config.n_sink, n_system)
        self._ledger = self._empty_ledger()
        least = self._n_pinned + 2 * self.config.window
        if self._policy.evicts and least > self.budget:
            raise SessionError(
                f"the system prompt takes {n_system} tokens, which always stay, and leaves too little of a budget of {self.budget}: "
                f"shorten it or give a budget of at least {least}"
            )
        return pieces

    def _empty_ledger(self) -> Ledger:
        ledger = Ledger(self._layout.n_layer, self._layout.n_head_kv, self._capacity + self._spare, self._observer.carries)
        ledger.n_pinned = self._n_pinned
        return ledger

    def _read(self, pieces: Sequence[Piece]) -> int:
        """Evaluates pieces, each in a segment of its role; returns the number of tokens."""
        parts = self.template.tokens(self.model, pieces)
        if self._ends_with("nexus"):
            # the end of the last answer was read before its Nexus tokens
            n = next(i for i, piece in enumerate(pieces) if piece.role != "assistant")
            pieces, parts = pieces[n:], parts[n:]
        return self._evaluate(pieces, parts)

    def _ends_with(self, role: str) -> bool:
        """Whether the last segment is of that role."""
        return bool(self._ledger.segments) and self._ledger.segments[-1].role == role

    def finish_turn(self) -> None:
        """Reads what ends the last answer, and Nexus tokens behind it, if the policy has them: now instead of with the next user turn."""
        if self._nexus and self._ends_with("assistant") and self.messages[-1]["role"] == "assistant":
            self._finish_turn()

    def _finish_turn(self) -> None:
        pieces = self.template.close_assistant(self._history_for_template(), self.messages[-1]["content"])
        self._evaluate(pieces, self.template.tokens(self.model, pieces))
        self._read_nexus()

    def _read_nexus(self) -> None:
        """Reads Nexus tokens for what came since the last ones: a user's turn and the answer to it, or a block of a long text."""
        ledger, policy = self._ledger, self._policy
        start = max((segment.end for segment in ledger.segments if segment.role in ("system", "nexus")), default=0)
        ratio = policy.compression if self.config.ratio is None else self.config.ratio
        k = n_nexus(ledger.n_tokens - start, ratio, policy.share, self._nexus.file.k)
        if ledger.n_cells + k > self._capacity + self._spare:
            self._compressor.compress(ledger)
        # there is room for a stride at least
        k = min(k, self._capacity + self._spare - ledger.n_cells)
        self._compressor.make_room(ledger, k)
        started = time.perf_counter()
        self._nexus.read(self._context, k, ledger.next_position)
        self.seconds.nexus += time.perf_counter() - started
        ledger.begin_segment("nexus")
        ledger.append(np.full(k, NEXUS, np.int32))
        self._peak = max(self._peak, ledger.n_cells)
        self._compressor.after_append(ledger)

    def _evaluate(self, pieces: Sequence[Piece], parts: Sequence[tuple[Role, npt.NDArray[np.int32]]]) -> int:
        """Evaluates pieces with their tokens; returns how many there are."""
        ids = np.concatenate([tokens for _, tokens in parts]) if parts else np.zeros(0, np.int32)
        ends = np.cumsum([len(tokens) for _, tokens in parts])
        breaks = self._breaks(pieces, parts) if self._nexus else []
        start = 0
        while True:
            stop = min(start + self._room(), breaks[0] if breaks else len(ids))
            # what of each piece is in this chunk; one without tokens counts where it stands
            inside = [
                (piece, min(end, stop) - max(end - len(tokens), start))
                for piece, (_, tokens), end in zip(pieces, parts, ends, strict=True)
                if end - len(tokens) < stop and end > start or not len(tokens) and start <= end <= stop
            ]
            if start < stop:
                self._append(ids[start:stop], "prefill", pieces=inside)
            else:
                self._note(inside, ids)
            if self._progress and len(ids) > self._context.n_ubatch:
                self._progress(stop, len(ids))
            if stop == len(ids):
                return stop
            if breaks and stop == breaks[0]:
                del breaks[0]
                self._read_nexus()
            start = stop

    def _breaks(self, pieces: Sequence[Piece], parts: Sequence[tuple[Role, npt.NDArray[np.int32]]]) -> list[int]:
        """After which tokens of the pieces Nexus tokens come: at ends of blocks in texts of the user that are long."""
        found, start = [], 0
        for piece, (_, tokens) in zip(pieces, parts, strict=True):
            if piece.role == "user" and len(tokens) > LONG_TEXT.max_block:
                ends = LONG_TEXT.split([self.model.token_bytes(token) for token in tokens.tolist()], None)
                found += (start + ends[:-1]).tolist()
            start += len(tokens)
        return found

    def _room(self) -> int:
        """How many tokens may be evaluated at once; at least one, which is refused where no cell is free."""
        return min(self._context.n_ubatch, max(1, self._capacity + self._spare - self._ledger.n_cells))

    def _note(self, pieces: Sequence[tuple[Piece, int]], ids: npt.NDArray[np.int32]) -> None:
        """Notes tokens that were evaluated in the ledger, the first of them from the first piece, and so on."""
        done = 0
        for piece, n in pieces:
            segments = self._ledger.segments
            # an answer's closing markup still belongs to it
            if not segments or segments[-1].role != piece.role:
                self._ledger.begin_segment(piece.role)
            if piece.kind == "content" and not segments[-1].text:
                segments[-1].text = piece.text.strip()[:_EXCERPT]
            self._ledger.append(ids[done : done + n])
            done += n

    def _append(
        self,
        tokens: npt.NDArray[np.int32],
        phase: Literal["prefill", "decode"],
        logits: Outputs = "last",
        pieces: Sequence[tuple[Piece, int]] = (),
    ) -> None:
        """Evaluates at most a micro-batch of tokens and compresses if that is due.

        pieces: where they come from, with the number of tokens of each; if not given, they go on with the last segment
        """
        if self._ledger.n_cells + len(tokens) > self._capacity + self._spare:
            # the compression after the last tokens may have failed
            self._compressor.compress(self._ledger)
        if self._ledger.n_cells + len(tokens) > self._capacity + self._spare:
            raise SessionError(
                "the text is longer than the spare cells of the cache: ask for more of them"
                if self._compressor.held
                else f"the cache of {self._capacity} cells is full and the policy {self.config.policy} removes nothing: "
                "choose another policy or a larger budget"
            )
        self._compressor.make_room(self._ledger, len(tokens))
        started = time.perf_counter()
        self._context.decode(tokens, self._ledger.next_position, logits=logits)
        seconds = self.seconds
        setattr(seconds, phase, getattr(seconds, phase) + time.perf_counter() - started)
        if pieces:
            self._note(pieces, tokens)
        else:
            self._ledger.append(tokens)
        self._peak = max(self._peak, self._ledger.n_cells)
        self._compressor.after_append(self._ledger)

    # turns

    def send(self, text: str) -> Iterator[str]:
        """Appends a user turn and generates the answer: yields its text as it comes, never half a character."""
        self.add_turn("user", text)
        return self.answer()

    def add_turn(self, role: str, content: str) -> None:
        """Appends a given turn, "user" or "assistant"; user turns and answers alternate. The last user turn may be answered with answer()."""
        last = self.messages[-1]["role"] if self.messages else "assistant"
        if role not in ("user", "assistant") or role == last:
            raise SessionError(f"after a turn of the {last} comes one of the {'user' if last == 'assistant' else 'assistant'}, not of {role!r}")
        if role == "user":
            if self._undo:
                recent = list(self._sampler.recent)
                self._checkpoint = _Checkpoint(self._ledger.n_tokens, len(self.messages), self._native.ring_state(), recent)
            if self._layout.is_swa:
                # what left the sliding window can't be brought back by cutting off the tail
                self._save_checkpoint()
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
        self._prediction = self._context.logits()
        self.n_answers += role == "assistant"

    def _read_timed(self, pieces: Sequence[Piece]) -> int:
        started = time.perf_counter()
        n = self._read(pieces)
        self._prompt_seconds = time.perf_counter() - started
        return n

    def _take_back(self, role: str) -> None:
        """A turn that could not be read to its end is as if it had not been given."""
        if role == "user" and self._checkpoint:
            self._rewind()
        else:
            self._read_again(self.messages[:-1])

    def _history_for_template(self) -> list[Message]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        # the markup depends on no more than the last turns
        return system + self.messages[-2:]

    def answer(self) -> Iterator[str]:
        """Generates the answer to the last user turn: yields its text as it comes.

        Closing the iterator, or an exception inside it, ends the answer; what there is of it stays.
        """
        if not self.messages or self.messages[-1]["role"] != "user":
            raise SessionError("there is no user turn to answer: send one first")
        self._stop = False
        self._sampler.begin(self.n_answers)
        self.n_answers += 1
        return self._generate()

    def _generate(self) -> Iterator[str]:
        stream = TextStream(self.template.stop_strings)
        message = {"role": "assistant", "content": ""}
        self.messages.append(message)
        n, drawn, reason, started = 0, [], "stopped", time.perf_counter()
        try:
            while not self._stop:
                if n >= self.max_tokens:
                    reason = "length"
                    break
                sampling = time.perf_counter()
                token = self._sampler.sample(self._context)
                drawn.append(token)
                self.seconds.sample += time.perf_counter() - sampling
                if token in self.model.end_tokens:
                    reason = "end"
                    break
                self._append(np.array([token], np.int32), "decode")
                n += 1
                text = stream.push(self.model.token_bytes(token))
                if text:
                    message["content"] += text
                    yield text
                if stream.stopped:
                    reason = "end"
                    break
            rest = stream.flush()
            if rest:
                message["content"] += rest
                yield rest
        except (Exception, KeyboardInterrupt):
            self._mend()
            raise
        finally:
            self._ledger.segments[-1].text = message["content"].strip()[:_EXCERPT]
            self.last = TurnStats(self._prompt_tokens, n, self._prompt_seconds, time.perf_counter() - started, reason, drawn)

    def add_answer(self, content: str, drawn: Sequence[int]) -> None:
        """As add_turn("assistant", content), for an answer that was drawn as these tokens (TurnStats.drawn): they are evaluated one by one, so
        that the cache becomes what it was then, and not only nearly so. If they are not the tokens of that text, it is added as any other.
        """
        stream = TextStream(self.template.stop_strings)
        if max(drawn, default=0) >= self.model.n_vocab or min(drawn, default=0) < 0:
            drawn = ()
        text = "".join(stream.push(self.model.token_bytes(token)) for token in drawn if token not in self.model.end_tokens) + stream.flush()
        if text != content or not self.messages or self.messages[-1]["role"] != "user":
            return self.add_turn("assistant", content)
        self.messages.append({"role": "assistant", "content": content})
        try:
            for token in drawn:
                self._sampler.accept(token)
                if token not in self.model.end_tokens:
                    self._append(np.array([token], np.int32), "decode")
        except BaseException:
            self._take_back("assistant")
            raise
        self.n_answers += 1
        self._ledger.segments[-1].text = content.strip()[:_EXCERPT]

    def second_read(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Reads the finished turns that were not read again yet a second time, for a policy that scores cells by it (KVzip).

        It leaves nothing in the cache but scores. Where it was stopped it goes on the next time.

        stop: asked before every stretch, which is a micro-batch at most

        Returns whether nothing is left to read.
        """
        if self._second_read is None or not self.messages or self.messages[-1]["role"] != "assistant":
            return True
        started = time.perf_counter()
        try:
            return self._second_read.run(self._ledger, stop)
        finally:
            self.seconds.reread += time.perf_counter() - started

    def compress(self) -> None:
        """Compresses to the budget now, if the cache is over it."""
        self._compressor.compress(self._ledger)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing is compressed inside, and on exit cache, ledger and messages are as they were. Can be nested.

        What is read inside must fit into the free and the spare cells. A user turn from outside can be followed by read_answer() inside, but not
        by answer() any more.
        """
        ledger, compressor = self._ledger, self._compressor
        outer, messages, last, checkpoint, prediction = compressor.held, list(self.messages), self.last, self._checkpoint, self._prediction
        n_answers = self.n_answers
        if not outer:
            compressor.make_room(ledger, min(self._capacity + self._spare - ledger.n_cells, self.model.n_ctx_train // 2))
            self._observer.before_removal(ledger)
        n_tokens, compressor.held, self._checkpoint = ledger.n_tokens, True, None
        segments = [replace(segment) for segment in ledger.segments]
        try:
            with taken_back(self._context, self._native):
                yield
        finally:
            compressor.held, self._checkpoint, self.last, self._prediction, self.messages[:] = outer, checkpoint, last, prediction, messages
            self.n_answers = n_answers
            ledger.truncate(n_tokens)
            ledger.segments[:] = segments

    def read_answer(self, content: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Reads a given answer to the last user turn and returns its tokens, int32 [n], and what the model predicted, float32 [n, n_vocab].

        Row i holds the logits from which token i would have been drawn. Needs n_outputs of at least n_ubatch.
        """
        pieces = self.template.given_assistant(self._history_for_template(), content)
        parts = self.template.tokens(self.model, pieces)
        self.messages.append({"role": "assistant", "content": content})
        self._ledger.begin_segment("assistant")
        rows, tokens = [], []
        for piece, (_, ids) in zip(pieces, parts, strict=True):
            is_content = piece.kind == "content"
            if is_content:
                rows.append(self._prediction[None])
            while len(ids):
                chunk, ids = np.split(ids, [self._room()])
                self._append(chunk, "prefill", "all" if is_content else "last")
                self._prediction = self._context.logits()
                if is_content:
                    tokens.append(chunk)
                    rows.append(self._context.logits_all())
        return np.concatenate(tokens), np.concatenate(rows)[:-1]

    def stop(self) -> None:
        """Ends the running answer after its current token; safe in a signal handler."""
        self._stop = True

    def regenerate(self) -> Iterator[str]:
        """Takes the last answer back and generates another one."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise SessionError("there is no answer to replace: send something first")
        user, _ = self.undo()
        return self.send(user["content"])

    def undo(self) -> list[Message]:
        """Takes the last user turn and what follows it out of the conversation and the cache, and returns them."""
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise SessionError("there is nothing to undo: send something first")
        taken = self.messages[users[-1] :]
        if self._checkpoint and self._checkpoint.n_messages == users[-1]:
            self._rewind()
        else:
            self._read_again(self.messages[: users[-1]])
        return taken

    def _save_checkpoint(self) -> None:
        """Copies the cache, once per turn, before something that cutting off the tail could not bring back."""
        checkpoint = self._checkpoint
        if checkpoint and checkpoint.state is None and self._ledger.n_cells:
            checkpoint.state, checkpoint.ledger = self._context.state_get(out=self._copy), self._ledger.copy()

    def _rewind(self) -> None:
        """The cache, the ledger and the messages as they were before the last user turn."""
        checkpoint = self._checkpoint
        self._checkpoint = None
        if checkpoint.state is not None:
            self._context.clear()
            self._context.state_set(0, checkpoint.state)
            self._ledger = checkpoint.ledger
        self._ledger.truncate(checkpoint.n_tokens)
        self._context.remove(0, self._ledger.next_position, -1)
        self._native.set_ring_state(checkpoint.ring)
        self._sampler.recent.clear()
        self._sampler.recent.extend(checkpoint.recent)
        del self.messages[checkpoint.n_messages :]

    def _mend(self) -> None:
        """After an exception in the middle of an answer: makes cache and ledger agree again."""
        self._context.remove(0, self._ledger.next_position, -1)
        if self._native.n_cells() != self._ledger.n_cells or self._context.pos_max(0) != self._ledger.next_position - 1:
            self._read_again(self.messages)

    def clear(self) -> None:
        """Forgets everything but the system prompt."""
        self._begin()

    def set_system(self, text: str | None) -> None:
        """Changes the system prompt and reads the conversation again under it. If that fails, everything stays as it was."""
        before, self._system = self._system, text
        messages = list(self.messages)
        try:
            self._read_again(messages)
        except BaseException:
            self._system = before
            self._read_again(messages)
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
        """As restore, in the same conversation."""
        n_answers = self.n_answers
        try:
            self.restore(messages)
        finally:
            self.n_answers = n_answers

    # a copy of the cache that outlives the process

    @property
    def signature(self) -> dict[str, Any]:
        """All settings that decide what is in the cache besides the model, the messages and the system prompt, as JSON can hold them."""
        names = ("policy", "ratio", "positions", "stride", "window", "n_sink", "type_k", "type_v", "n_ubatch")
        settings = {name: getattr(self.config, name) for name in names}
        return settings | {"policy_args": asdict(self._policy), "budget": self.budget, "cells": self._capacity + self._spare}

    @property
    def nexus(self) -> NexusTokens | None:
        """The Nexus tokens in use."""
        return self._nexus

    def snapshot(self) -> dict[str, npt.NDArray[np.generic]]:
        """What the answers to come depend on, after an answer and besides `signature`, model, messages and system prompt; `resume` takes it.

        numbers: int64 [4]; recent: int32 [n], tokens the repeat penalty looks at; cache, ring: uint8 [bytes]; ledger.*: Ledger.arrays; and if the
        last turn can be taken back, checkpoint.numbers: int64 [2], checkpoint.recent, checkpoint.ring, and checkpoint.cache and
        checkpoint.ledger.* if need be
        """
        if self._layout.is_swa:
            # the cells of the window get the order that they have after `resume`: sums of floats depend on it
            with taken_back(self._context, self._native):
                pass
        compressor, checkpoint = self._compressor, self._checkpoint
        arrays = {
            "numbers": np.array([compressor.compressions, compressor.rotations, self._peak, self.n_answers], np.int64),
            "recent": np.array(self._sampler.recent, np.int32),
            "cache": self._context.state_get(),
            "ring": self._native.ring_state(),
            **_named("ledger", self._ledger),
        }
        if checkpoint:
            arrays |= {"checkpoint.numbers": np.array([checkpoint.n_tokens, checkpoint.n_messages], np.int64), "checkpoint.ring": checkpoint.ring}
            arrays["checkpoint.recent"] = np.array(checkpoint.recent, np.int32)
            if checkpoint.ledger:
                arrays |= {"checkpoint.cache": checkpoint.state, **_named("checkpoint.ledger", checkpoint.ledger)}
        return {name: array for name, array in arrays.items() if array is not None}

    def snapshot_limits(self, n_text: int) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
        """The type and the largest shape of each array of a `snapshot`, whose last dimension may be smaller. n_text: tokens there can be."""
        cells = self._ledger.tokens.shape
        n_ring = 0 if (ring := self._native.ring_state()) is None else len(ring)
        ledger = {"numbers": ("<i8", (4,)), "ids": ("<i4", (n_text,)), "block_of": ("<i4", (n_text,)), "segments": ("u1", (n_text,))}
        ledger |= {"tokens": ("<i4", cells), "positions": ("<i4", cells), **{name: ("<f4", cells) for name in self._ledger.carried}}
        limits = {"numbers": ("<i8", (4,)), "checkpoint.numbers": ("<i8", (2,))}
        for prefix in ("", "checkpoint."):
            limits[f"{prefix}recent"] = ("<i4", (self._sampler.recent.maxlen,))
            limits |= {f"{prefix}cache": ("u1", (_copy_bytes(self._context),)), f"{prefix}ring": ("u1", (n_ring,))}
            limits |= {f"{prefix}ledger.{name}": limit for name, limit in ledger.items()}
        return limits

    def resume(self, messages: Sequence[Message], arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Goes on from a `snapshot` that a session with the same signature, model and system prompt gave after these messages.

        Raises:
            SessionError: it does not fit; the session is then at its beginning.
        """
        self._reset()
        try:
            # first, because whether it can be gone back to shows in the cache
            checkpoint = self._checkpoint_of(arrays) if "checkpoint.numbers" in arrays else None
            self._ledger.take(_of("ledger", arrays))
            self._fill(self._ledger, arrays["cache"], arrays.get("ring"))
            self._compressor.compressions, self._compressor.rotations, self._peak, self.n_answers = arrays["numbers"].tolist()
            self._sampler.recent.extend(self._tokens_of(arrays["recent"]))
            if checkpoint and not checkpoint.ledger:
                _check_tail(checkpoint, self._ledger)
            self._checkpoint = checkpoint
        except (KvlocalError, LookupError, TypeError, ValueError, AttributeError) as error:
            self._begin()
            raise SessionError(f"this is no state of such a session ({error}): read the messages again") from error
        self.messages[:] = [dict(message) for message in messages]

    def _tokens_of(self, array: npt.NDArray[np.generic]) -> list[int]:
        tokens = array.tolist()
        for token in tokens:
            self.model.check_token(token)
        return tokens

    def _fill(self, ledger: Ledger, cache: npt.NDArray[np.uint8], ring: npt.NDArray[np.uint8] | None) -> None:
        """Puts into the cache what a snapshot holds of it; ValueError, or an error of the engine, if that is not what the ledger says."""
        self._context.state_set(0, cache)
        self._native.set_ring_state(ring)
        end = ledger.next_position
        # the positions that the mask looks at; those of the window's cache end where they do
        if not np.array_equal(self._native.positions(), np.arange(end - ledger.n_cells, end)) or self._context.pos_max(0) != end - 1:
            raise ValueError("cache and ledger differ")

    def _checkpoint_of(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> _Checkpoint:
        """The checkpoint of a snapshot; its cache, if it has one, is in the cache then."""
        n_tokens, n_messages = arrays["checkpoint.numbers"].tolist()
        checkpoint = _Checkpoint(n_tokens, n_messages, arrays.get("checkpoint.ring"), self._tokens_of(arrays["checkpoint.recent"]))
        self._native.set_ring_state(checkpoint.ring)
        if "checkpoint.cache" in arrays:
            checkpoint.ledger = self._empty_ledger()
            checkpoint.ledger.take(_of("checkpoint.ledger", arrays))
            checkpoint.state = arrays["checkpoint.cache"]
            self._fill(checkpoint.ledger, checkpoint.state, checkpoint.ring)
            _check_tail(checkpoint, checkpoint.ledger)
        return checkpoint

    def set_sampling(self, sampling: SamplingParams) -> None:
        """Draws tokens in another way from the next answer on."""
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
        ledger = self._ledger
        return KvStats(
            self._compressor.target(ledger),
            ledger.n_cells,
            self._context.n_cells,
            self._peak,
            ledger.n_tokens - ledger.n_nexus,
            self._compressor.compressions,
            ledger.n_tokens - ledger.n_cells,
            ledger.next_position,
            float(ledger.nexus().mean(axis=(0, 1)).sum()) if self._nexus else 0.0,
            self._compressor.rotations,
        )

    @property
    def seconds(self) -> Seconds:
        """Where the time went since the session was made."""
        return self._compressor.seconds

    def segments(self) -> list[SegmentStats]:
        """What is left of each turn, in order."""
        counts = self._ledger.cells_per_segment()
        stats, turn, before = [], 0, ""
        for segment, cells in zip(self._ledger.segments, counts, strict=True):
            # Nexus tokens divide a long text
            turn += segment.role == "user" != before
            before = before if segment.role == "nexus" else segment.role
            stats.append(
                SegmentStats(
                    segment.role,
                    turn,
                    segment.end - segment.start,
                    float(cells.mean()),
                    int(cells.min()),
                    segment.end <= self._ledger.n_pinned,
                    segment.text,
                )
            )
        return stats

    def close(self) -> None:
        """Frees the cache. Closing twice is harmless."""
        self._sampler.close()
        self._context.close()
        self._checkpoint = None
        # session and compressor refer to each other; without this the ledger would wait for the garbage collector
        self._compressor.before = None

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_tail(checkpoint: _Checkpoint, ledger: Ledger) -> None:
    """ValueError unless cutting off what came after the checkpoint leaves something that it can be."""
    if not 0 < checkpoint.n_tokens <= ledger.n_tokens or ledger.n_tokens - checkpoint.n_tokens > ledger.n_cells:
        raise ValueError("the last turn is not in the cache")


def _copy_bytes(context: Context) -> int:
    """What a copy of a cache takes at most."""
    return context.kv_bytes() + context.kv_bytes() // 50 + 2**16


def _named(prefix: str, ledger: Ledger) -> dict[str, npt.NDArray[np.generic]]:
    return {f"{prefix}.{name}": array for name, array in ledger.arrays().items()}


def _of(prefix: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
    return {name.removeprefix(f"{prefix}."): array for name, array in arrays.items() if name.startswith(f"{prefix}.")}
