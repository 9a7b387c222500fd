"""Talk about everyday things, made from the templates of small_talk.toml, to stand between what matters in a chat."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from importlib.resources import files


def small_talk(rng: random.Random) -> Iterator[tuple[str, str]]:
    """User turns and answers without end; none of the questions comes twice before all of them came."""
    texts = tomllib.loads(files("kvlocal.evaluation").joinpath("small_talk.toml").read_text(encoding="utf-8"))
    pairs = [(question, thing, part) for question in texts["questions"] for thing, part in texts["things"]]
    while True:
        rng.shuffle(pairs)
        for question, thing, part in pairs:
            sentences = [rng.choice(texts["openings"]), *rng.sample(texts["sentences"], rng.randint(2, 5))]
            yield question.format(thing=thing), " ".join(sentences).format(thing=thing, part=part)
