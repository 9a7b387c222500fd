"""Answerer: what draws answers into a cache, one at a time, and tells how it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Self, TypeVar

from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.cache.compression import Seconds
from kvlocal.cache.config import allocation
from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal.chat.answering import AnswerInProgress
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.stats import KvStats, SegmentStats, TurnStats, segment_stats
from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import Sampler, SamplingParams

T = TypeVar("T")


class Answerer:
    """What the answers to turns and the continuations of texts have in common. Who makes it sets

    model: the weights
    config: how it is kept and answered
    cache: where the tokens go
    max_tokens: the longest answer; may be set
    last: the last answer in numbers, None before the first
    """

    model: Model
    config: SessionConfig
    cache: BudgetedCache
    max_tokens: int
    last: TurnStats | None
    _sampler: Sampler
    # the one that is on its way, or that is to come
    _answer: AnswerInProgress | None

    def _until_end(self, answer: AnswerInProgress, options: AnswerOptions, form: Callable[[str, AnswerPiece], T]) -> Iterator[T]:
        """What the answer says as it comes, each time in a form that may be empty, which is then left out."""
        # by a name, so that what is raised from outside does not end it before it is mended
        pieces = answer.pieces(options.max_tokens or self.max_tokens, options.top_logprobs)
        try:
            for text, piece in pieces:
                if formed := form(text, piece):
                    yield formed
        except (Exception, KeyboardInterrupt):
            if not answer.over:
                self._mend(answer)
            raise
        finally:
            if self._answer is answer:
                self._end_answer()

    def _mend(self, answer: AnswerInProgress) -> None:
        """After an exception in the middle of an answer: the cache holds what is noted again, or is not used any more."""
        self._answer = None
        if not self.cache.set_length(self.cache.ledger.n_tokens):
            self._recover()
        answer.break_off()
        self.last = answer.stats

    def _recover(self) -> None:
        """After a failure that left the cells uncertain, while another error is on its way."""

    def stop(self) -> None:
        """Ends the answer that is on its way as it is, without the token that is just evaluated, or before its first one while the turn is still
        read; safe in a signal handler."""
        answer = self._answer
        if answer is not None:
            answer.stopped = True

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

    # how tokens are drawn

    def set_sampling(self, sampling: SamplingParams) -> None:
        """Draws tokens in another way from the next answer on; the repeat penalty still looks at those of the last ones."""
        self._end_answer()
        sampler = Sampler(self.model, sampling)
        sampler.recent.extend(self._sampler.recent)
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

    def settings(self) -> dict[str, Any]:
        """What an answer depends on besides the model, the text and AnswerOptions, as it is in use, by the names of SessionConfig and SamplingParams.

        With the same again a machine gives the same answer. Where an archive is kept makes no difference.
        """
        values = asdict(self.config)
        sampling = values.pop("sampling")
        del values["archive_dir"], values["archive_ram"]
        in_use = {
            "budget": allocation(self.config, self.model.n_ctx_train).budget,
            "archive": self.config.store,
            "read_stride": self.config.slack,
            "n_threads": load().llama_cpp.llama_n_threads(self.cache.context.pointer),
            "seed": self.seed,
        }
        return {**values, **sampling, **in_use}

    def segments(self) -> list[SegmentStats]:
        """What is left of each turn, in order."""
        return segment_stats(self.cache)

    def close(self) -> None:
        """Frees the cache. Closing twice is harmless."""
        self._leave_answer()
        self._sampler.close()
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
