"""A line of JSON in somebody's file: strict in what it says, tolerant of how its bytes are set."""

from __future__ import annotations

import json
import math
from typing import Any

from kvlocal.errors import KvlocalError
from kvlocal.files.text import text_of


class JsonError(KvlocalError):
    """Some bytes are no JSON, or have numbers that JSON does not have.

    found: what they say all the same, where it can be made out: with None for such numbers, and U+FFFD for bytes that are not UTF-8
    """

    def __init__(self, text: str, found: Any = None) -> None:
        super().__init__(text)
        self.found = found


def json_value(line: bytes) -> Any:
    """What a line says, with or without a byte order mark and the end of the line.

    Raises:
        JsonError: it is no JSON in UTF-8.
    """
    refused: list[str] = []

    def refuse(name: str) -> None:
        refused.append(f"{name} is no JSON number")

    def finite(text: str) -> float | None:
        # 1e999 would come out as Infinity, which is no JSON
        value = float(text)
        if math.isinf(value):
            refused.append(f"{text[:20]} is too large a number")
            return None
        return value

    try:
        text, problem = text_of(line), None
    except UnicodeDecodeError:
        text, problem = text_of(line, "replace"), "it is not UTF-8: convert the file"
    try:
        found = json.loads(text, parse_constant=refuse, parse_float=finite)
    except json.JSONDecodeError as error:
        raise JsonError(problem or f"it is not JSON ({error.msg} at column {error.colno}): write one object a line") from None
    except (ValueError, RecursionError) as error:
        raise JsonError(problem or f"it cannot be read as JSON ({error}): write one object a line") from None
    if refused and not problem:
        problem = f"it cannot be read as JSON ({refused[0]}): write one object a line"
    if problem:
        raise JsonError(problem, found)
    return found
