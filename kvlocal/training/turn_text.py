"""Judges what a model has written as a turn of a dialogue."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

FENCE = "```"

# An end of a sentence, but not the number of a list item.
_SENTENCE_END = re.compile(r"(?<!\d)[.!?…。！？][\"'”’)\]*]*(?=\s|$)|\n")
_MARKUP = re.compile(
    r"<\|[^|>]{1,40}\|>|\[/?INST\]|</?s>|<(start|end)_of_turn>|^#{2,3} ?(User|Assistant|System|Human)\b|^(User|Assistant|Human) ?:", re.MULTILINE
)

# What an assistant says and hardly ever a user.
_NOT_A_USER = re.compile(
    r"^(sure|certainly|of course|absolutely|as an ai|i'?m (sorry|here to|glad|happy|ready)|here (is|are)\b)|"
    r"\b(as an ai|as a language model|ai assistant|can i (help|assist) you|how may i (help|assist)|i'?m here to (help|assist)|"
    r"feel free to|i'?d be happy to|happy to help|let me know if you)\b",
    re.IGNORECASE,
)


def in_code(text: str) -> bool:
    """Whether a text ends inside a block of code."""
    return text.count(FENCE) % 2 == 1


def sentence_ends(text: str) -> list[int]:
    """Where a sentence or a line ends, in characters from the start."""
    return [match.end() for match in _SENTENCE_END.finditer(text)]


def flaw(role: str, text: str, written: str, markers: Sequence[str], earlier: Sequence[str]) -> str | None:
    """What is wrong with a turn, in a word or two, or None.

    Args:
        role: whose turn it is.
        text: the turn.
        written: the part of it that the model wrote.
        markers: texts of the chat template's control tokens.
        earlier: the texts of the turns before it.
    """
    if not re.search(r"\w", text):
        return "empty"
    if "\ufffd" in text:
        return "broken characters"
    if _MARKUP.search(text) or any(marker in text for marker in markers):
        return "markup"
    if in_code(text):
        return "unfinished code"
    if _repeats(text):
        return "repetition"
    if written and _shares_run(written, earlier):
        return "echo"
    if role == "user" and _NOT_A_USER.search(written.strip()):
        return "assistant's voice"
    return None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = _plain(text).split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _shares_run(text: str, earlier: Sequence[str]) -> bool:
    """Whether a text is one of the earlier ones, or has ten words in a row from one of them."""
    runs = set(_runs(text, 10))
    return any(_plain(text) == _plain(other) or not runs.isdisjoint(_runs(other, 10)) for other in earlier)


def _repeats(text: str) -> bool:
    """Whether a text goes round in circles."""
    lines = Counter(line.strip() for line in text.splitlines() if len(line.strip()) > 12)
    if any(Counter(runs).most_common(1)[0][1] > most for n, most in ((4, 3), (10, 1)) if (runs := _runs(text, n))):
        return True
    data = text.encode()
    return max(lines.values(), default=0) > 2 or (len(data) > 200 and len(zlib.compress(data, 9)) < 0.3 * len(data))
