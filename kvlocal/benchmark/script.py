"""The conversation that every side of a comparison reads: written by a seed, the same tokens for all of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.pieces import Piece

Tokens = npt.NDArray[np.int32]

_SEED = 5
_USER_TOKENS = 60  # a user's text is at least this long, and at most a sentence longer

_THINGS = (
    "maps", "bees", "clocks", "rivers", "bread", "glass", "stars", "salt", "ships", "paper", "ice", "moss", "bridges", "songs", "owls", "ink",
    "rope", "chess", "tea", "wool",
)  # fmt: skip
_PLACES = (
    "a harbour", "a small town", "the desert", "an old mill", "the north", "a school", "an island", "a market", "the mountains", "a city at night",
)  # fmt: skip
_SENTENCES = (
    "Yesterday I read about {0} and {1} in {2}.",
    "The author said that {0} had changed the life of the people in {2}.",
    "Nobody in {2} had thought of {1} before, and nobody asked what {0} were good for.",
    "What do you know about {0}, and what have {1} to do with it?",
    "In {2} they say that {0} come first and {1} come later, but I am not sure about that.",
    "My sister keeps {0} in {2}; she would rather have {1}, or so she told me last year.",
)


@dataclass(frozen=True)
class Turn:
    """One turn of the conversation.

    text: what the user says
    user: its tokens with the markup around them, from the end of the last answer to the start of the next, int32 [n]
    answer: the tokens of the answer to it, without markup, int32 [n_answer]
    """

    text: str
    user: Tokens
    answer: Tokens


class Script:
    """A conversation without end in the tokens of one model.

    model: whose vocabulary and chat template
    n_answer: tokens of each answer

    prefix: what comes before the first turn, int32 [n]
    """

    def __init__(self, model: Model, n_answer: int):
        self._model, self._n_answer = model, n_answer
        self._template = ChatTemplate.from_model(model)
        self.prefix = self._tokens(self._template.prefix(None))

    def _tokens(self, pieces: list[Piece]) -> Tokens:
        return np.concatenate([np.zeros(0, np.int32), *(tokens for _, tokens in self._template.tokens(self._model, pieces))])

    def _text(self, rng: random.Random, n: int) -> str:
        """Sentences of at least n tokens."""
        text = ""
        while len(self._model.tokenize(text, parse_special=False)) < n:
            sentence = rng.choice(_SENTENCES).format(*rng.sample(_THINGS, 2), rng.choice(_PLACES))
            text = f"{text} {sentence}".lstrip()
        return text

    def turn(self, i: int) -> Turn:
        """Turn i, from 0."""
        rng = random.Random(f"{_SEED}/{i}")
        text, answer = self._text(rng, _USER_TOKENS), self._text(rng, self._n_answer)
        # the markup depends on no more than whether there was a turn before
        before = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}] if i else []
        user = self._tokens(self._template.user_turn(before, text))
        return Turn(text, user, self._model.tokenize(answer, parse_special=False)[: self._n_answer])

    def n_tokens(self, n_turns: int) -> int:
        """Tokens of a conversation of so many turns."""
        return len(self.prefix) + sum(len(turn.user) + len(turn.answer) for turn in map(self.turn, range(n_turns)))

    def filler(self, n: int) -> Tokens:
        """Tokens with which an answer can go on, int32 [n]."""
        return np.resize(self.turn(0).answer, n)
