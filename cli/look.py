"""The options of commands that show answers: how they look on a terminal, and what becomes of thoughts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import click

from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate
from kvlocal_cli.option_lists import add_options

Think = Literal["show", "hide", "off"]


@dataclass(frozen=True)
class Look:
    """How answers look.

    plain: Markdown is shown as it was written
    think: thoughts are shown, hidden, or not made
    """

    plain: bool = False
    think: Think = "show"


_OPTIONS = (
    click.option("--plain", is_flag=True, help="On a terminal, show Markdown as it is written; words are still wrapped."),
    click.option(
        "--think", type=click.Choice(get_args(Think)), default="show", show_default=True,
        help="Thoughts of a model that thinks: show them, hide them, or have none made, where its chat template knows how to ask for that.",
    ),
)  # fmt: skip


def look_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds these options to a command, which gets `look: Look` of them."""

    @functools.wraps(command)
    def with_look(*args: Any, plain: bool, think: Think, **others: Any) -> Any:
        return command(*args, look=Look(plain, think), **others)

    return add_options(with_look, _OPTIONS)


def warn_of_thoughts(name: str, model: Model, look: Look) -> None:
    """Say on stderr that a model will think although it is not to."""
    template = ChatTemplate.from_model(model)
    if look.think == "off" and template.has_thoughts and not template.can_leave_thinking_out:
        click.echo(f"kvlocal: the chat template of {name} has no switch for thoughts: they are made and not shown", err=True)
