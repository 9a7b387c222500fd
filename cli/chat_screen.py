"""Where what belongs to a chat goes on a terminal and without one."""

import sys

import click
from rich.console import Console

from kvlocal.chat.stats import KvStats, TurnStats
from kvlocal.conversations.records import Conversation
from kvlocal.template.answer import split_thought
from kvlocal_cli.terminal import is_terminal, printable


class Screen:
    """Where what belongs to a chat goes: answers and what a command was asked for to stdout, the rest beside them.

    Args:
        verbose: show notes and status lines, on stderr, also where there is no terminal.
        person: False where no person takes part, also on a terminal.

    Attributes:
        interactive: whether a person types: stdin and at least one output are a terminal.
    """

    def __init__(self, *, verbose: bool, person: bool = True) -> None:
        outputs = [stream for stream in (sys.stdout, sys.stderr) if is_terminal(stream)]
        self.interactive = person and is_terminal(sys.stdin) and bool(outputs)
        self.terminal = outputs[0] if self.interactive else sys.stderr
        self._notes = Console(file=self.terminal, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._silent = not (self.interactive or verbose)

    def note(self, text: str, *, is_prose: bool = False) -> None:
        """A dim line that is nobody's answer. is_prose: on a terminal it is broken between words; it has no path to copy."""
        if not self._silent:
            self._notes.print(text, style="dim", soft_wrap=not (is_prose and self._notes.is_terminal))

    def show(self, text: str) -> None:
        """What a command was asked for."""
        click.echo(text, file=self.terminal if self.interactive else sys.stdout)

    def agrees(self, question: str) -> bool:
        """Whether the person says yes to this, which Ctrl-C does not; without a person, a script means what it says."""
        if not self.interactive:
            return True
        try:
            return click.confirm(question, err=self.terminal is sys.stderr)
        except click.Abort:
            click.echo(file=self.terminal)
            return False

    def warn(self, text: str) -> None:
        """Something went wrong."""
        click.echo(f"kvlocal: {text}", err=True)


def status_line(last: TurnStats, kv: KvStats, compressions: int) -> str:
    """What is said behind an answer. compressions: how many there were before it."""
    parts = [
        f"{last.tokens_per_second:.1f} tok/s",
        f"{kv.used}/{kv.budget} cells",
        f"{kv.history_tokens} tokens of history",
        f"{kv.compressions} compression{'s' * (kv.compressions != 1)}",
    ]
    if kv.compressions > compressions:
        parts[-1] += f" ({kv.compressions - compressions} in this turn)"
    if last.recalled:
        parts.append(f"recalled from turn{'s' * (len(last.recalled) > 1)} {', '.join(map(str, last.recalled))}")
    if last.stop_reason == "stopped":
        parts.insert(0, "stopped")
    elif last.stop_reason == "length":
        parts.insert(0, f"cut off at {last.answer_tokens} tokens")
    return " · ".join(parts)


def last_exchange(conversation: Conversation, n_lines: int = 20) -> str:
    """The last turn and its answer without its thought, of each no more than so many lines."""
    shown = []
    for message in conversation.messages[-2:]:
        said = split_thought(message["content"])[2] if message["role"] == "assistant" else ""
        lines = printable(said or message["content"]).strip().splitlines()
        cut = [*lines[:n_lines], f"… {len(lines) - n_lines} more lines"] if len(lines) > n_lines else lines
        shown.append(("\n>>> " if message["role"] == "user" else "") + "\n".join(cut))
    return "\n".join(shown) + "\n"
