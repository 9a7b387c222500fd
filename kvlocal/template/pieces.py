"""Piece: a stretch of the text of a conversation, which comes from the template or from someone who wrote it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Role = Literal["system", "user", "assistant"]
Kind = Literal["markup", "content"]


@dataclass(frozen=True)
class Piece:
    """A stretch of text with one origin.

    Attributes:
        role: whose turn it belongs to; everything before the first user turn is "system".
        text: never empty.
        kind: "markup" comes from the template and may contain control tokens; "content" was written by someone and
            never yields one.
        before: of the first piece of a list, template text like that in front of it ("" at the start of a
            conversation); some vocabularies put a space behind a control token, or swallow one.
    """

    role: Role
    text: str
    kind: Kind
    before: str = field(default="", compare=False, repr=False)


def pieces_of(before: str, *parts: tuple[Role, str, Kind]) -> list[Piece]:
    """Pieces of the parts that have a text, `before` being the template text in front of them."""
    pieces = [Piece(role, text, kind) for role, text, kind in parts if text]
    return [replace(pieces[0], before=before), *pieces[1:]] if pieces else []
