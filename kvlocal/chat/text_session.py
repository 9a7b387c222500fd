"""TextSession: a text that a model goes on with, as it is and without a chat template, inside a fixed KV budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from kvlocal.cache.budgeted import BudgetedCache, Passage, Progress
from kvlocal.cache.fitting import fitted
from kvlocal.chat.answer_piece import AnswerPiece, TokenLogprob
from kvlocal.chat.answer_rules import text_rules
from kvlocal.chat.answerer import Answerer
from kvlocal.chat.answering import AnswerInProgress, token_logprob
from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.options import AnswerOptions
from kvlocal.llama.context import Context
from kvlocal.llama.errors import EngineError
from kvlocal.llama.grammar import Grammar
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import Sampler
from kvlocal.llama.sequence_decoder import SequenceDecoder
from kvlocal.template.answer import AnswerStream
from kvlocal.template.pieces import Piece
from kvlocal.template.tokenizer import PieceTokenizer

# the roles of segments: what was given, and what goes on with it
_GIVEN, _GOES_ON = "user", "assistant"

Prompt = str | Sequence[int] | npt.NDArray[np.int32]


def prompt_tokens(model: Model, prompt: Prompt) -> npt.NDArray[np.int32]:
    """The tokens of a text that is to be gone on with, int32 [n], n at least 1: those that are given as they are; those of a text with what the model
    wants in front, and with control tokens where their texts are. Without any text it is what texts begin with.

    Raises:
        SessionError: there is nothing to go on with, or something that is no token.
    """
    if isinstance(prompt, str):
        ids = _tokenized(model, prompt)
    else:
        if wrong := [token for token in (min(prompt, default=0), max(prompt, default=0)) if not 0 <= token < model.n_vocab]:
            raise SessionError(f"{wrong[0]} is no token: the model's tokens go from 0 to {model.n_vocab - 1}")
        ids = np.array(prompt, np.int32)
    if not len(ids):
        raise SessionError("there is nothing to go on with: give at least one token")
    return ids


def _tokenized(model: Model, text: str) -> npt.NDArray[np.int32]:
    try:
        tokens = model.tokenize(text, parse_special=True)
    except EngineError as error:
        raise SessionError(str(error)) from error
    # what separates texts stands before the first one, too
    front = model.bos if model.bos is not None else model.eos
    wanted = model.add_bos or not len(tokens)
    if front is None or not wanted or (len(tokens) and tokens[0] == front):
        return tokens
    return np.concatenate([np.array([front], np.int32), tokens])


class TextSession(Answerer):
    """A text and what a model goes on with, in a cache that never grows.

    `read` takes the whole text each time. What it has in common with the text before, with what was drawn, is not read again as far as the cache
    has the way back to there. A text beyond the budget is compressed as a chat is, and there is no end of it. The last token that was given counts
    to what goes on with the text: it asks for what comes next.

    After a failure in the middle of a change the cache is not used any more: the next `read` reads all of the text.

    model: the weights; must outlive the session
    config: budget, policy and sampling; what is in it of a chat, a system prompt, tools and second reads, has no effect
    progress: called with (tokens done, tokens in all) while a text is read
    undo: keep what an earlier text is gone back to with, as Turns has it
    make_context: makes the cells: Context, or what gives a slot beside others (kvlocal.llama.slots)

    cache: the tokens of the text (kvlocal.cache.budgeted)
    last: the last continuation in numbers, None before the first
    max_tokens: the longest continuation; may be set
    prompt_logprobs: of the tokens of the text that was read last, if they were asked for

    Raises CacheError if budget and model do not go together, EngineError or NativeError if the model cannot be run or compressed. Nothing is left
    open then.
    """

    def __init__(
        self,
        model: Model,
        config: SessionConfig = SessionConfig(),
        *,
        progress: Progress | None = None,
        undo: bool = True,
        make_context: Callable[..., SequenceDecoder] = Context,
    ) -> None:
        self.model = model
        self.config = config = fitted(model.path, config, model.placement)
        self.max_tokens = config.max_tokens
        self.last = None
        self.prompt_logprobs: Sequence[TokenLogprob] = ()
        self._answer = None
        self._progress: Progress = progress or (lambda done, total: None)
        # tokens that were read last and how long that took, until they are gone on with
        self._prompt: tuple[int, float] | None = None
        self._n_given = 0  # tokens of that text
        self._n_drawn = 0  # continuations
        with ExitStack() as opened:
            self.cache = BudgetedCache(model, config, undo=undo, make_context=make_context)
            opened.callback(self.cache.close)
            self._reader = _TextReader(self.cache)
            self._sampler = Sampler(model, config.sampling)
            opened.pop_all()

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """The text so far, with what was drawn, int32 [n]."""
        return self.cache.ledger.ids

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """The tokens of a text that is to be gone on with, as prompt_tokens has them."""
        return prompt_tokens(self.model, text)

    def read(self, prompt: Prompt, *, top_logprobs: int | None = None) -> int:
        """Makes the text this one, to be gone on with by `pieces` or `answer`; returns how many of its tokens were there already.

        Args:
            prompt: the whole text, or its tokens, which are taken as they are.
            top_logprobs: how likely each token of it is and so many of the likeliest in its place, for `prompt_logprobs`; None for none at all. It
                is read token by token then, all of it.

        Raises:
            SessionError: there is nothing in it, or something that is no token.
            CacheError: there is no room for it. The next call reads all of the text.
        """
        self._end_answer()
        self._prompt, self.prompt_logprobs = None, ()
        # stop() may come while the text is read
        self._answer = AnswerInProgress(self._reader)
        ids = prompt_tokens(self.model, prompt)
        started = time.perf_counter()
        n_known = self._go_back_to(0 if top_logprobs is not None else _n_common(self.tokens, ids[:-1]))
        try:
            self._read(ids, n_known, top_logprobs)
        except BaseException:
            # what was read stays, if the cells hold what is noted of it
            self.cache.set_length(self.cache.ledger.n_tokens)
            raise
        self._sampler.recent.clear()
        self._sampler.recent.extend(ids.tolist())
        self._n_given = len(ids)
        self._prompt = len(ids) - n_known, time.perf_counter() - started
        return n_known

    def _go_back_to(self, n_tokens: int) -> int:
        """The text becomes its first tokens, as many of n_tokens as the way back leaves; returns how many."""
        cache = self.cache
        n_there = 0 if cache.uncertain else cache.ledger.n_tokens
        if n_there == n_tokens and not cache.uncertain:
            return n_tokens
        lengths = [length for length in reversed(cache.marked) if 0 < length <= n_tokens]
        # A few tokens can be cut off the end, but the cells that were chosen for them stay: the same text is gone on with in the same way from marks.
        if 0 < n_there - n_tokens < cache.layout.n_window and not cache.layout.is_recurrent:
            lengths.insert(0 if n_tokens >= self._n_given else len(lengths), n_tokens)
        found = next((length for length in lengths if cache.set_length(length)), 0)
        if not found:
            cache.begin(0)
        return found

    def _read(self, ids: npt.NDArray[np.int32], n_known: int, top_logprobs: int | None) -> None:
        """Reads the tokens from n_known on, and takes their log-probabilities."""
        n, told = len(ids), []
        # what is evaluated a second time must come behind what can be gone back to
        mark_at = max(n_known, n - 1 - self.cache.n_again)
        stops = sorted({mark_at, n - 1} - {n_known})
        if top_logprobs is not None:
            told.append(TokenLogprob(self.model.token_bytes(int(ids[0]), special=True), math.nan))
            stops = [*range(n_known + 1, n)]
        start = n_known
        for stop in stops:
            if start == mark_at > 0:
                self.cache.mark()
            self.cache.read([Passage(_GIVEN, ids[start:stop])], lambda done, _, start=start: self._progress(start - n_known + done, n - n_known))  # type: ignore[misc]
            if top_logprobs is not None:
                told.append(token_logprob(self.cache, int(ids[stop]), top_logprobs))
            start = stop
        if stops:
            self.cache.recall_for_answer()
        self.cache.read([Passage(_GOES_ON, ids[-1:])])
        self.prompt_logprobs = told

    def answer(self, options: AnswerOptions = AnswerOptions()) -> Iterator[str]:
        """Goes on with the text that was read: yields what comes, never half a character.

        Closing the iterator, stop(), or an exception inside it, ends the continuation; what there is of it stays. So does the next `read`; the
        iterator raises SessionError after that. To go on again the text is read again, with what was drawn; nothing of it is evaluated twice then.

        Raises:
            SessionError: no text was read, or the options are of a chat.
            GrammarError: the grammar is wrong.
        """
        return self._until_end(self._begin(options), options, lambda text, _: text)

    def pieces(self, options: AnswerOptions = AnswerOptions()) -> Iterator[AnswerPiece]:
        """As `answer`, for programs: with log-probabilities."""
        return self._until_end(self._begin(options), options, lambda _, piece: piece)

    def _begin(self, options: AnswerOptions) -> AnswerInProgress:
        self._end_answer()
        if self._prompt is None or self.cache.uncertain:
            raise SessionError("there is no text to go on with: read one first")
        rules = text_rules(options)
        grammar = Grammar(self.model, rules) if rules else None
        answer = self._answer = self._answer or AnswerInProgress(self._reader)
        answer.begin(self._sampler, AnswerStream(self.model, asked_stop=options.stop), (), *self._prompt)
        # the same seed goes on with the same text in the same way
        self._sampler.begin(0 if self.sampling.seed is not None else self._n_drawn, grammar)
        self._prompt = None
        self._n_drawn += 1
        return answer


class _TextReader:
    """Brings text behind what was drawn into a cache (kvlocal.chat.answering.PieceReader)."""

    def __init__(self, cache: BudgetedCache) -> None:
        self.cache = cache
        self.end_tokens: Collection[int] = cache.model.end_tokens
        self._tokenizer = PieceTokenizer(cache.model, "")

    def passages(self, pieces: Sequence[Piece]) -> list[Passage]:
        return [Passage(piece.role, tokens) for piece, (_, tokens) in zip(pieces, self._tokenizer.run(pieces), strict=True)]

    def read(self, pieces: Sequence[Piece]) -> int:
        return self.cache.read(self.passages(pieces)) if pieces else 0


def _n_common(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """With how many tokens two texts begin alike."""
    n = min(len(one), len(other))
    different = np.flatnonzero(one[:n] != other[:n])
    return int(different[0]) if len(different) else n
