"""How well facts from early turns can be recalled from a compressed context."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.dialogues import Dialogue
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.distances import Distances
from kvlocal.evaluation.given_answer import read_answer
from kvlocal.evaluation.history import margin, read_history, turn_tokens
from kvlocal.evaluation.recall_chats import Question, recall_chats
from kvlocal.evaluation.runner import Measurement
from kvlocal.evaluation.variants import Variant
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.chat_template import ChatTemplate

MAX_ANSWER = 24  # tokens that the model writes
_SPARE = 160  # tokens of a question and an answer, more than any of them has

DISTANCES = Distances(500, 1000, 2000)


class RecallTask:
    """Generated chats; see kvlocal.evaluation.recall_chats.

    A chat's history is read once with compression on, and every question is then asked with nothing more removed. Metrics: `choice`, 1 where
    the right answer has a higher mean log-probability per token than each of the distractors, after the same words; `greedy`, 1 where the
    answer that the model writes itself names the right value and none of the distractors. `choice@500-1000` and the like are those of the
    questions whose fact is that many tokens away from the end of the history.
    """

    name = "recall"
    metrics = tuple(f"{metric}{at}" for at in ("", *(f"@{name}" for name in DISTANCES.names))
                    for metric in ("choice", "greedy"))  # fmt: skip

    def __init__(
        self, model: Model, base: SessionConfig, n_questions: int, n_tokens: int, seed: int, dialogues: Sequence[Dialogue] = (),
        nexus: NexusTokens | None = None,
    ) -> None:
        """nexus: for the policies that need Nexus tokens. Raises KvlocalError if the model was not trained for so long a history."""
        longest = model.n_ctx_train - margin(base) - _SPARE
        if n_tokens > longest:
            raise KvlocalError(f"a history of {n_tokens} tokens is too long for a model trained on {model.n_ctx_train}: give at most {longest}")
        template = ChatTemplate.from_model(model)
        self._model, self._base, self._nexus = model, base, nexus
        self._chats = recall_chats(
            n_questions, n_tokens, seed, lambda messages: [len(tokens) for tokens in turn_tokens(model, template, messages)], dialogues
        )
        self.n_chats = len(self._chats)

    def measure(self, index: int, variant: Variant) -> Measurement:
        """Reads chat `index` with one variant and asks all of its questions.

        Raises:
            KvlocalError: the chat cannot be read so.
        """
        chat = self._chats[index]
        values: dict[str, list[float]] = {}
        reading = read_history(self._model, self._base, variant, chat.history, chat.n_history, chat.n_prefix, _SPARE, self._nexus)
        with reading as (session, compression):
            session.max_tokens = MAX_ANSWER
            for question in chat.questions:
                for metric, right in (("choice", chooses(session, question)), ("greedy", answers(session, question))):
                    for name in (metric, f"{metric}@{DISTANCES.name(question.distance)}"):
                        values.setdefault(name, []).append(float(right))
        return Measurement(compression, values)


def chooses(session: ChatSession, question: Question) -> bool:
    """Whether the right answer is more likely than each of the distractors."""
    reads = []
    with session.hold():
        session.add_turn("user", question.text)
        for option in (question.answer, *question.distractors):
            with session.hold():
                reads.append(read_answer(session, f"{question.lead} {option}"))
    right, *wrong = mean_log_probabilities(reads)
    return right > max(wrong)


def mean_log_probabilities(reads: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]) -> list[float]:
    """The mean log-probability per token of each answer, from the first token on in which they differ.

    reads: tokens int32 [n] and logits float32 [n, n_vocab] of each
    """
    n_shared = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*(tokens.tolist() for tokens, _ in reads), strict=False))))
    means = []
    for tokens, logits in reads:
        # one answer may be the beginning of another
        start = min(n_shared, len(tokens) - 1)
        rows = logits[start:].astype(np.float64)
        top = rows.max(axis=-1)
        logp = np.take_along_axis(rows, tokens[start:, None], axis=-1)[:, 0] - top - np.log(np.exp(rows - top[:, None]).sum(axis=-1))
        means.append(float(logp.mean()))
    return means


def answers(session: ChatSession, question: Question) -> bool:
    """Whether the model's own answer names the right value and no other."""
    with session.hold():
        session.add_turn("user", question.text)
        answer = "".join(session.answer())
    return names(answer, question.answer) and not any(names(answer, value) for value in question.distractors)


def names(text: str, value: str) -> bool:
    """Whether all words of the value are in the text, in any order and in upper or lower case; `14th` is 14, and `4,127` is 4127."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower())
    return set(value.lower().split()) <= {re.sub(r"^(\d+)(?:st|nd|rd|th)$", r"\1", word) for word in re.findall(r"\w+", text)}
