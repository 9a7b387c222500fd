"""Chats to train on: dialogues as tokens, turn by turn, joined until a chat is long enough to be compressed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvlocal.conversations.dialogues import Dialogue, load
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate

_BUCKETS = 2**32
_LEAST = 16  # tokens of a last turn that is cut


@dataclass(frozen=True)
class ChatTurn:
    """Tokens of one origin, int32 [n]. written: the model writes them, one by one, in a chat; they are what training judges."""

    tokens: npt.NDArray[np.int32]
    written: bool


@dataclass(frozen=True)
class TrainingChat:
    """A conversation. n_prefix: tokens that come before the first turn."""

    turns: tuple[ChatTurn, ...]
    n_prefix: int

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        return np.concatenate([turn.tokens for turn in self.turns]).astype(np.int64)

    @property
    def lengths(self) -> list[tuple[int, bool]]:
        """As Timetable.of takes turns."""
        return [(len(turn.tokens), turn.written) for turn in self.turns]

    @property
    def judged(self) -> npt.NDArray[np.int64]:
        """The tokens behind which the model writes an answer or ends it, int64 [n]."""
        written = np.repeat([turn.written for turn in self.turns], [len(turn.tokens) for turn in self.turns])
        return np.flatnonzero(written[1:] | written[:-1])


@dataclass(frozen=True)
class Chats:
    """What files of dialogues give.

    prefix: what comes before the first turn of a chat
    training, held_out: the turns of each dialogue; disjoint, and which one a dialogue belongs to depends on its own tokens alone
    digests: SHA-256 of each file
    """

    prefix: ChatTurn
    training: tuple[tuple[ChatTurn, ...], ...]
    held_out: tuple[tuple[ChatTurn, ...], ...]
    digests: tuple[str, ...]

    def chat(self, dialogues: Sequence[tuple[ChatTurn, ...]], max_tokens: int) -> TrainingChat:
        """These dialogues one after another, as far as there is room; the last turn may be cut."""
        turns, left = [self.prefix], max_tokens - len(self.prefix.tokens)
        for turn in (turn for dialogue in dialogues for turn in dialogue):
            if left < min(_LEAST, len(turn.tokens)):
                break
            turns.append(ChatTurn(turn.tokens[:left], turn.written))
            left -= len(turns[-1].tokens)
        return TrainingChat(tuple(_joined(turns)), len(self.prefix.tokens))

    def nth(self, n: int, seed: int, max_tokens: int) -> TrainingChat:
        """The n-th chat to train on: dialogues in an order of their own in each round, as many as a chat has room for."""
        order = np.random.default_rng([seed, 2, n]).permutation(len(self.training))
        return self.chat([self.training[i] for i in order[: _enough(self.training, order, max_tokens)]], max_tokens)

    def chats_of(self, dialogues: Sequence[tuple[ChatTurn, ...]], n: int, max_tokens: int) -> list[TrainingChat]:
        """At most n chats, each of the dialogues in one of them."""
        found: list[TrainingChat] = []
        begin = 0
        while begin < len(dialogues) and len(found) < n:
            end = begin + _enough(dialogues, np.arange(begin, len(dialogues)), max_tokens)
            found.append(self.chat(dialogues[begin:end], max_tokens))
            begin = end
        return found


def _enough(dialogues: Sequence[tuple[ChatTurn, ...]], order: npt.NDArray[np.integer], n_tokens: int) -> int:
    """How many of the dialogues in this order have so many tokens together, or all."""
    lengths = np.cumsum([sum(len(turn.tokens) for turn in dialogues[i]) for i in order])
    return min(len(order), int(np.searchsorted(lengths, n_tokens)) + 1)


def read_chats(model: Model, paths: Sequence[Path], *, held_out: float) -> Chats:
    """Reads files of dialogues, in the formats of kvlocal.conversations.dialogues.

    Args:
        model: tokenizer and chat template.
        held_out: share of the dialogues that is kept for evaluation.

    Raises:
        KvlocalError: a file cannot be used, or there is nothing to train on.
    """
    template = ChatTemplate.from_model(model)
    data = [load(path) for path in paths]
    found: dict[bytes, tuple[ChatTurn, ...]] = {}
    for dialogue in (dialogue for part in data for dialogue in part.dialogues):
        turns = tuple(_turns(model, template, dialogue))
        found.setdefault(hashlib.sha256(np.concatenate([turn.tokens for turn in turns]).astype("<i4").tobytes()).digest(), turns)
    chosen = {key for key in found if int.from_bytes(key[:4]) < held_out * _BUCKETS}
    training = tuple(turns for key, turns in found.items() if key not in chosen)
    if not training:
        raise KvlocalError("the data hold no dialogue to train on: give more of them")
    prefix = [tokens for _, tokens in template.tokens(model, template.prefix(None))]
    return Chats(
        prefix=ChatTurn(np.concatenate([np.empty(0, np.int32), *prefix]), False),
        training=training,
        held_out=tuple(found[key] for key in sorted(chosen)),
        digests=tuple(part.digest for part in data),
    )


def _turns(model: Model, template: ChatTemplate, dialogue: Dialogue) -> Iterator[ChatTurn]:
    """What the user says with the markup around it, what the model answers, and the markup that closes the answer, pair by pair."""
    messages = dialogue.messages
    for i in range(0, len(messages), 2):
        before, user, answer = messages[:i], messages[i]["content"], messages[i + 1]["content"]
        # the end of the answer before belongs to that
        opened = len(template.close_assistant(before, "")) if before else 0
        parts = [
            *template.user_turn(before, user)[opened:],
            *template.given_assistant(messages[: i + 1], answer),
            *template.close_assistant(messages[: i + 2], answer),
        ]
        for piece, (_, tokens) in zip(parts, template.tokens(model, parts), strict=True):
            yield ChatTurn(tokens, (piece.role, piece.kind) == ("assistant", "content"))


def _joined(turns: Sequence[ChatTurn]) -> Iterator[ChatTurn]:
    """The same, with neighbours of one kind as one turn."""
    for written, group in itertools.groupby(turns, lambda turn: turn.written):
        yield ChatTurn(np.concatenate([turn.tokens for turn in group]), written)
