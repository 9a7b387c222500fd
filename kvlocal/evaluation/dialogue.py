"""How far the predictions of a compressed context are from those of the full one, on the last turns of dialogues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvlocal.chat.config import SessionConfig
from kvlocal.conversations.dialogues import Dialogue
from kvlocal.evaluation.given_answer import read_answer
from kvlocal.evaluation.history import margin, read_history, turn_tokens
from kvlocal.evaluation.reference import Reference, ReferenceCache, log_softmax
from kvlocal.evaluation.runner import Measurement
from kvlocal.evaluation.variants import FULL, Variant
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.markup import Message

MAX_ANSWER = 256  # tokens of the last answer that are measured

METRICS = ("kl", "agreement", "cross_entropy")


@dataclass(frozen=True)
class MeasuredChat:
    """A history and the turn it is measured on.

    history: messages before the last user turn
    user, answer: the last turn; the answer cut to about MAX_ANSWER tokens
    tokens: int32 [n], of all of it
    n_prefix, n_history: how many of them come before the first turn, and before the last user turn
    group: how the group of chats that it belongs to is called behind a metric's name, "" for none
    """

    history: list[Message]
    user: str
    answer: str
    tokens: npt.NDArray[np.int32]
    n_prefix: int
    n_history: int
    group: str = ""


class DialogueTask:
    """Chats made of `concat` dialogues each, in the order given.

    For each, the history is read turn by turn with compression on, and then the last turn with nothing more removed. Metrics, each the mean
    over the answer's tokens: `kl`, KL(full || compressed) over the whole vocabulary in nats; `agreement`, how often both find the same token
    most likely; `cross_entropy` of the answer, in nats. Where chats are told apart by a label, such as the `task` of the dialogue that the last turn
    is from, each is also given for those that have it in common, as `kl@task=AR`.

    n_too_long: chats that were left out because the full context would not fit what the model was trained for
    n_without_history: chats that were left out because nothing comes before their last turn
    """

    name = "dialogue"

    def __init__(
        self, model: Model, base: SessionConfig, dialogues: Sequence[Dialogue], concat: int, cache: ReferenceCache, depends: object,
        nexus: NexusTokens | None = None, by: str | None = None, reference: Model | None = None,
    ) -> None:
        """depends: what the full context's predictions depend on besides the tokens, see ReferenceCache.get. nexus: for the policies that
        need Nexus tokens. by: the label of dialogues (Dialogue.labels) by which metrics are given too. reference: predicts with the full context what
        all are compared with; by default the same model."""
        self._reference_model = reference or model
        self._model, self._base, self._cache, self._depends, self._nexus = model, base, cache, depends, nexus
        self._template = ChatTemplate.from_model(model)
        self._chats: list[MeasuredChat] = []
        self.n_too_long = self.n_without_history = 0
        for start in range(0, len(dialogues), concat):
            turns = [turn for dialogue in dialogues[start : start + concat] for turn in dialogue.turns]
            if len(turns) == 1:
                self.n_without_history += 1
                continue
            label = dialogues[start : start + concat][-1].labels.get(by) if by else None
            chat = self._chat(Dialogue(tuple(turns)).messages, "" if label is None else f"@{by}={label}")
            if len(chat.tokens) + margin(base) > model.n_ctx_train:
                self.n_too_long += 1
            else:
                self._chats.append(chat)
        self.n_chats = len(self._chats)
        groups = ["", *sorted({chat.group for chat in self._chats} - {""})]
        self.metrics = tuple(f"{metric}{group}" for group in groups for metric in METRICS)
        self._current: tuple[int, Reference, npt.NDArray[np.float32]] | None = None

    def _chat(self, messages: list[Message], group: str) -> MeasuredChat:
        answer = _cut(self._model, messages[-1]["content"])
        turns = turn_tokens(self._model, self._template, [*messages[:-1], {"role": "assistant", "content": answer}])
        lengths = [len(tokens) for tokens in turns]
        return MeasuredChat(messages[:-2], messages[-2]["content"], answer, np.concatenate(turns), lengths[0], sum(lengths[:-2]), group)

    def measure(self, index: int, variant: Variant) -> Measurement:
        """Reads chat `index` with one variant.

        Raises:
            KvlocalError: the chat cannot be read so.
        """
        (reference, full), chat = self._reference(index), self._chats[index]
        if variant == FULL and self._reference_model is self._model:
            compression, found = 0.0, {"kl": 0.0, "agreement": 1.0, "cross_entropy": float(reference.loss.mean())}
        else:
            compression, tokens, logits = self._read(chat, variant, self._model)
            assert np.array_equal(tokens, reference.tokens)
            found = compare(reference, full, logits)
        return Measurement(compression, {f"{name}{group}": [value] for group in dict.fromkeys(["", chat.group]) for name, value in found.items()})

    def _reference(self, index: int) -> tuple[Reference, npt.NDArray[np.float32]]:
        """What the full context predicts, and its log-probabilities as float32 [n, n_vocab]; kept for one chat."""
        if self._current is None or self._current[0] != index:
            self._current = None
            chat = self._chats[index]
            reference = self._cache.get(self._depends, chat.tokens, lambda: Reference.of(*self._read(chat, FULL, self._reference_model)[1:]))
            # float16 has rounded them
            self._current = index, reference, log_softmax(reference.logp)
        return self._current[1:]

    def _read(self, chat: MeasuredChat, variant: Variant, model: Model) -> tuple[float, npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The compression reached, the answer's tokens int32 [n], and what was predicted for each, logits float32 [n, n_vocab]."""
        spare = len(chat.tokens) - chat.n_history
        reading = read_history(model, self._base, variant, chat.history, chat.n_history, chat.n_prefix, spare, self._nexus)
        with reading as (session, compression), session.hold():
            session.add_turn("user", chat.user)
            return compression, *read_answer(session, chat.answer)


def compare(reference: Reference, full: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> dict[str, float]:
    """The metrics of one answer.

    full: float32 [n, n_vocab], log-probabilities of the full context
    logits: float32 [n, n_vocab], of the compressed one
    """
    compressed = log_softmax(logits)
    # [n], exact over the vocabulary
    kl = (np.exp(full) * (full - compressed)).sum(axis=-1, dtype=np.float64)
    loss = -np.take_along_axis(compressed, reference.tokens[:, None], axis=-1)
    return {
        "kl": float(kl.mean()),
        "agreement": float((logits.argmax(axis=-1) == reference.top).mean()),
        "cross_entropy": float(loss.mean(dtype=np.float64)),
    }


def _cut(model: Model, text: str) -> str:
    """The text as far as its first MAX_ANSWER tokens go, in whole characters."""
    tokens = model.tokenize(text, parse_special=False)
    if len(tokens) <= MAX_ANSWER:
        return text
    start = b"".join(model.token_bytes(token) for token in tokens[:MAX_ANSWER].tolist()).decode("utf-8", "ignore")
    return start.removeprefix(" ") if model.adds_space else start
