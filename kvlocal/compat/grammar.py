"""LlamaGrammar: what an answer follows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from kvlocal.compat.errors import NotSupported
from kvlocal.errors import KvlocalError


class Rules(NamedTuple):
    """What an answer has to follow: a grammar in GBNF, or a JSON schema, or nothing."""

    grammar: str | None = None
    json_schema: Mapping[str, Any] | None = None


class LlamaGrammar:
    """A grammar, made by one of the class methods; it is looked at when an answer is to follow it.

    rules: what it says
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> Self:
        """Of a text in GBNF, llama.cpp's notation. verbose: of no effect"""
        return cls(Rules(grammar))

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> Self:
        """Of a file in GBNF. verbose: of no effect

        Raises:
            KvlocalError: it cannot be read, or is empty.
        """
        try:
            with open(file, encoding="utf-8") as opened:
                text = opened.read()
        except (OSError, UnicodeDecodeError) as error:
            raise KvlocalError(f"the grammar {os.fspath(file)} cannot be read ({error}): give a text file in GBNF") from error
        if not text:
            raise KvlocalError(f"the grammar {os.fspath(file)} is empty: give a text file in GBNF")
        return cls(Rules(text))

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> Self:
        """Of a JSON schema, as text. verbose: of no effect

        Raises:
            KvlocalError: it is no JSON object.
        """
        try:
            schema = json.loads(json_schema)
        except (ValueError, TypeError, RecursionError) as error:
            raise KvlocalError(f"the JSON schema cannot be read ({error}): give an object as text") from None
        if not isinstance(schema, dict):
            raise KvlocalError("the JSON schema is no object: give one as text")
        return cls(Rules(None, schema))


def rules_of(grammar: Any) -> Rules:
    """What a `grammar` argument says: None, a text in GBNF, a LlamaGrammar, or llama-cpp-python's own.

    Raises:
        NotSupported: it is something else.
    """
    if isinstance(grammar, LlamaGrammar):
        return grammar.rules
    text = getattr(grammar, "_grammar", grammar)
    if text is not None and not isinstance(text, str):
        raise NotSupported("the grammar is neither a LlamaGrammar nor a text in GBNF: give one of them")
    return Rules(text)
