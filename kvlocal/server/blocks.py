"""Blocks: the objects of which newer APIs make up messages, and what is told where one is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvlocal.server.errors import ApiError, invalid


def string_of(block: Mapping[str, Any], name: str, place: str) -> str:
    """A field of a block that has to be a text.

    place: of the block, as an error names it

    Raises:
        ApiError: it is none.
    """
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{place}.{name} has to be a string", f"{place}.{name}")
    return value


def unknown(kind: Any, place: str) -> ApiError:
    """A block is of a type that says nothing to a model of texts."""
    return invalid(f"{place} is of the type {json.dumps(kind)[:40]}, which the model cannot read: leave it out", f"{place}.type")
