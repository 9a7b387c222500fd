"""What ends answers, as the template and the vocabulary of a model have it: the metadata of a file can be wrong about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.template.markup import Markup

_MIN_STOP = 3  # characters of a text that ends answers


def found_ends(model: Model, markup: Markup, family_stops: Sequence[str]) -> tuple[frozenset[int], tuple[str, ...]]:
    """The tokens that end answers, and the texts that do where no token does.

    markup: of the template
    family_stops: texts that end answers of the model's family
    """
    inner = set(special_tokens(model, markup.thoughts.before + markup.thoughts.after)) if markup.thoughts else set()
    ends: set[int] = set()
    stops: list[str] = []
    for text in (markup.last_closing, markup.closing):
        marker = next((token for token in special_tokens(model, text) if token not in inner), None)
        if marker is not None:
            ends.add(marker)
        elif len(text.strip()) >= _MIN_STOP and not special_tokens(model, text):
            stops.append(text.strip())
    if not ends and not stops:
        # an answer that has no end goes on with the user's next turn
        behind = markup.closing + markup.user_header
        marker = next((token for token in special_tokens(model, behind) if token not in inner), None)
        if marker is not None:
            ends.add(marker)
        elif len(behind.strip()) >= _MIN_STOP:
            stops.append(("\n" if behind[: -len(behind.lstrip())].endswith("\n") else "") + behind.strip())
    for text in family_stops:
        if is_one_token(model, text):
            ends.add(int(model.tokenize(text, parse_special=True)[0]))
        else:
            stops.append(text)
    return model.end_tokens | ends, tuple(dict.fromkeys(stops))


def is_one_token(model: Model, text: str) -> bool:
    """Whether a text is one token of the vocabulary."""
    return len(model.tokenize(text, parse_special=True)) == 1


def special_tokens(model: Model, text: str) -> list[int]:
    """The control tokens and the like in a text, in order."""
    lib = load().llama_cpp
    special = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
    tokens = map(int, model.tokenize(text, parse_special=True))
    return [token for token in tokens if model.token_attributes(token) & special and model.token_bytes(token, special=True).strip()]


def texts_of(model: Model, tokens: Iterable[int]) -> list[str]:
    """The texts of tokens."""
    return [model.token_bytes(token, special=True).decode("utf-8", "replace") for token in tokens]
