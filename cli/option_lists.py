"""Lists of options that several commands have."""

from collections.abc import Callable, Iterable
from typing import Any

Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def add_options(command: Callable[..., Any], options: Iterable[Option]) -> Callable[..., Any]:
    """Adds options, each as click.option gives it; the help shows them in their order."""
    for option in reversed([*options]):
        command = option(command)
    return command
