"""Training examples: conversations as tokens by segment, from files of dialogues."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvlocal.cache.second_read import EXCHANGE, INSTRUCTION
from kvlocal.conversations.dialogues import Dialogue, load
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.pieces import Piece

_BUCKETS = 2**32


@dataclass(frozen=True)
class Example:
    """A conversation, or as many of its turns as fit.

    prefix: int32 [n], what comes before the first turn
    segments: int32 [n] each, a user's turn with the answer to it and the markup that closes the answer; at least two
    """

    prefix: npt.NDArray[np.int32]
    segments: tuple[npt.NDArray[np.int32], ...]

    @property
    def n_tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.segments))

    def behind(self, other: Example, max_tokens: int) -> Example:
        """This conversation as it goes on from the other one, of which the last segments are taken that there is room for."""
        room = max_tokens - self.n_tokens
        ends = np.cumsum([len(segment) for segment in other.segments[::-1]])
        n = int((ends <= room).sum())
        return Example(self.prefix, other.segments[len(other.segments) - n :] + self.segments)

    def cut(self, segment: int, at: int) -> Example:
        """The same conversation with one segment in two, the first of `at` tokens, as a long turn is in a session."""
        parts = np.split(self.segments[segment], [at])
        return Example(self.prefix, (*self.segments[:segment], *parts, *self.segments[segment + 1 :]))

    def recited(self, n: int, segment: int, instruction: npt.NDArray[np.int32]) -> Example:
        """The first n segments, then the instruction (Examples.instruction) and one of them again, token by token."""
        return Example(self.prefix, (*self.segments[:n], np.concatenate([instruction, self.segments[segment]])))

    @property
    def key(self) -> bytes:
        """Names the example by what it says."""
        return hashlib.sha256(np.concatenate([self.prefix, *self.segments]).astype("<i4").tobytes()).digest()


@dataclass(frozen=True)
class Examples:
    """What files of dialogues give.

    training, held_out: disjoint; which one an example belongs to depends on its own tokens alone
    instruction: int32 [n], the turn that asks the model to repeat what was said
    n_dialogues: dialogues read
    n_empty: lines that were left out because a text of theirs is empty, or because they have no answer
    n_split: dialogues that were cut in parts because they are longer than an example may be
    n_single: dialogues, or parts of one, that were left out because they have one segment and nothing follows it
    n_too_long: segments that were left out because an example cannot hold them
    n_repeated: examples that were left out because there is another one like them
    digests: SHA-256 of each file
    """

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    instruction: npt.NDArray[np.int32]
    n_dialogues: int
    n_empty: int
    n_split: int
    n_single: int
    n_too_long: int
    n_repeated: int
    digests: tuple[str, ...]

    @property
    def left_out(self) -> dict[str, int]:
        """How many were left out or cut, by reason."""
        return {name.removeprefix("n_"): getattr(self, name) for name in ("n_empty", "n_split", "n_single", "n_too_long", "n_repeated")}


def read(model: Model, paths: Sequence[Path], *, max_tokens: int, held_out: float) -> Examples:
    """Reads files of dialogues, in the formats of kvlocal.conversations.dialogues.

    Args:
        model: tokenizer and chat template.
        max_tokens: tokens of an example at most; longer dialogues are cut between segments.
        held_out: share of the examples that is kept for evaluation.

    Raises:
        KvlocalError: a file cannot be used, or there is nothing to train on.
    """
    template = ChatTemplate.from_model(model)
    data = [load(path) for path in paths]
    dialogues = [dialogue for part in data for dialogue in part.dialogues]
    found: dict[bytes, Example] = {}
    n_split = n_single = n_too_long = n_repeated = 0
    for dialogue in dialogues:
        prefix, *segments = _segments(model, template, dialogue)
        fitting = [segment for segment in segments if len(prefix) + len(segment) <= max_tokens]
        n_too_long += len(segments) - len(fitting)
        parts = list(_parts(fitting, max_tokens - len(prefix)))
        n_split += len(parts) > 1
        for part in parts:
            example = Example(prefix, tuple(part))
            if len(part) < 2:
                n_single += 1
            elif example.key in found:
                n_repeated += 1
            else:
                found[example.key] = example
    chosen = {key for key in found if int.from_bytes(key[:4]) < held_out * _BUCKETS}
    training = tuple(example for key, example in found.items() if key not in chosen)
    if not training:
        raise KvlocalError(f"the data hold no conversation of two turns within {max_tokens} tokens to train on: give more of them")
    return Examples(
        training=training,
        held_out=tuple(found[key] for key in sorted(chosen)),
        instruction=np.concatenate(_turn(model, template, EXCHANGE, INSTRUCTION)),
        n_dialogues=len(dialogues),
        n_empty=sum(part.n_empty for part in data),
        n_split=n_split,
        n_single=n_single,
        n_too_long=n_too_long,
        n_repeated=n_repeated,
        digests=tuple(part.digest for part in data),
    )


def joined(examples: Sequence[Example], n: int, max_tokens: int) -> list[Example]:
    """Each example behind the n - 1 that come after it in the sequence, as far as there is room; after the last comes the first."""
    found = []
    for i, example in enumerate(examples):
        for k in range(1, min(n, len(examples))):
            example = example.behind(examples[(i + k) % len(examples)], max_tokens)
        found.append(example)
    return found


def _segments(model: Model, template: ChatTemplate, dialogue: Dialogue) -> Iterator[npt.NDArray[np.int32]]:
    """What comes before the first turn, then the segments, each read as a session reads it."""

    def tokens(pieces: list[Piece]) -> list[npt.NDArray[np.int32]]:
        return [array for _, array in template.tokens(model, pieces)]

    def joined(*parts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return np.concatenate([np.empty(0, np.int32), *parts])

    messages = dialogue.messages
    yield joined(*tokens(template.prefix(None)))
    for i in range(0, len(messages), 2):
        before, user, answer = messages[:i], messages[i]["content"], messages[i + 1]["content"]
        turn = _turn(model, template, before, user)
        given = tokens(template.given_assistant(messages[: i + 1], answer))
        yield joined(*turn, *given, *tokens(template.close_assistant(messages[: i + 2], answer)))


def _turn(model: Model, template: ChatTemplate, before: list[dict[str, str]], user: str) -> list[npt.NDArray[np.int32]]:
    """A user's turn behind these messages; the end of the answer before is not part of it."""
    closing = template.close_assistant(before, "") if before else []
    return [array for _, array in template.tokens(model, template.user_turn(before, user))][len(closing) :]


def _parts(segments: Sequence[npt.NDArray[np.int32]], n: int) -> Iterator[list[npt.NDArray[np.int32]]]:
    """Successive segments of at most n tokens together."""
    part: list[npt.NDArray[np.int32]] = []
    for segment in segments:
        if part and sum(map(len, part)) + len(segment) > n:
            yield part
            part = []
        part.append(segment)
    if part:
        yield part
