"""The options of commands that answer: what every answer has to be like."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kvlocal.chat.config import SessionError
from kvlocal.chat.options import AnswerOptions
from kvlocal.files.text import text_of
from kvlocal_cli.option_lists import add_options
from kvlocal_cli.options import clean_text

_OPTIONS = (
    click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before this text; can be repeated."),
    click.option(
        "--json-schema", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
        help="Make every answer a JSON value of the schema in this file.",
    ),
    click.option(
        "--grammar", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
        help="Make every answer follow the grammar in this file, in llama.cpp's GBNF.",
    ),
)


def answer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds these options to a command, which gets `asked: AnswerOptions` of them."""

    @functools.wraps(command)
    def with_options(*args: Any, stop: tuple[str, ...], json_schema: Path | None, grammar: Path | None, **others: Any) -> Any:
        try:
            schema = None if json_schema is None else _schema(json_schema)
            asked = AnswerOptions(stop=[*map(clean_text, stop)], json_schema=schema, grammar=None if grammar is None else _text(grammar))
        except SessionError as error:
            raise click.UsageError(str(error)) from error
        return command(*args, asked=asked, **others)

    return add_options(with_options, _OPTIONS)


def _text(path: Path) -> str:
    try:
        return text_of(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} cannot be read: name a text file") from error


def _schema(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is no JSON: correct it") from error
    if not isinstance(schema, dict):
        raise click.UsageError(f"{path} is no JSON schema: write an object")
    return schema
