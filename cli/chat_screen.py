"""Where what belongs to a chat goes on a terminal and without one."""

import sys

import click
from rich.console import Console

from kvlocal_cli.terminal import is_terminal


class Screen:
    """Where what belongs to a chat goes: answers and what a command was asked for to stdout, the rest beside them.

    Args:
        verbose: show notes and status lines, on stderr, also where there is no terminal.

    Attributes:
        interactive: whether a person types: stdin and at least one output are a terminal.
    """

    def __init__(self, *, verbose: bool) -> None:
        outputs = [stream for stream in (sys.stdout, sys.stderr) if is_terminal(stream)]
        self.interactive = is_terminal(sys.stdin) and bool(outputs)
        self.terminal = outputs[0] if self.interactive else sys.stderr
        self._notes = Console(file=self.terminal, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._silent = not (self.interactive or verbose)

    def note(self, text: str) -> None:
        """A dim line that is nobody's answer."""
        if not self._silent:
            self._notes.print(text, style="dim")

    def show(self, text: str) -> None:
        """What a command was asked for."""
        click.echo(text, file=self.terminal if self.interactive else sys.stdout)

    def agrees(self, question: str) -> bool:
        """Whether the person says yes to this; without one, a script means what it says."""
        return not self.interactive or click.confirm(question, err=self.terminal is sys.stderr)

    def warn(self, text: str) -> None:
        """Something went wrong."""
        click.echo(f"kvlocal: {text}", err=True)
