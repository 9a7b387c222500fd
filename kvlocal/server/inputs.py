"""Inputs: the texts of a request, which it gives as texts or as tokens, one or several."""

from __future__ import annotations

from typing import Any

from kvlocal.chat.text_session import Prompt
from kvlocal.server.errors import invalid
from kvlocal.server.schemas import MAX_INPUTS, Texts


def texts_of(given: Texts, name: str, n_vocab: int) -> list[Prompt]:
    """Each of the texts, or its tokens.

    name: of the field that has them

    Raises:
        ApiError: there is none, there are too many, or one has something that is no token.
    """
    inputs: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not inputs:
        raise invalid(f"{name} is empty: give a text or tokens", name)
    if len(inputs) > MAX_INPUTS:
        raise invalid(f"{name} has {len(inputs)} texts: give at most {MAX_INPUTS}", name)
    for i, each in enumerate(inputs):
        place = name if each is given else f"{name}.{i}"
        if not isinstance(each, str) and not each:
            raise invalid(f"{place} has no tokens: give at least one", place)
        if not isinstance(each, str) and (wrong := [token for token in (min(each), max(each)) if not 0 <= token < n_vocab]):
            raise invalid(f"{place} has {wrong[0]}, which is no token: tokens go from 0 to {n_vocab - 1}", place)
    return inputs
