"""How an answer is shown while it comes: as it is where there is no terminal, else with words wrapped, Markdown rendered and its thought apart."""

import sys
from typing import Protocol

import click
from rich.console import Console
from rich.status import Status

from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal_cli.look import Look, Think
from kvlocal_cli.markdown_stream import THEME, MarkdownStream
from kvlocal_cli.terminal import is_terminal, printable
from kvlocal_cli.word_wrap import WordWrap


class AnswerView(Protocol):
    """Where the pieces of an answer go.

    think: what becomes of its thought; may be set
    """

    think: Think

    def write(self, text: str, piece: AnswerPiece) -> None:
        """What is new in the answer, as one text with the thought in front, and with its parts told apart."""
        ...

    def end(self) -> None:
        """The answer has ended, whatever ended it; another one may come."""
        ...


def answer_view(look: Look, *, is_markdown: bool = True, separator: str = "") -> AnswerView:
    """How answers are shown on this standard output.

    Args:
        is_markdown: whether they may be rendered as Markdown.
        separator: the line between two answers where there is no terminal.
    """
    if is_terminal(sys.stdout):
        return TerminalView(Console(theme=THEME, highlight=False, markup=False, emoji=False), look, is_markdown=is_markdown)
    return PlainView(look.think, separator)


class Unseen:
    """An answer that is not shown."""

    think: Think = "show"

    def write(self, text: str, piece: AnswerPiece) -> None:
        pass

    def end(self) -> None:
        pass


class PlainView:
    """Answers as they are, at once, each with the end of its last line, and a line between two."""

    def __init__(self, think: Think, separator: str = "") -> None:
        self.think = think
        self._separator = separator
        self._last = ""  # that was written of this answer
        self._has_answered = False

    def write(self, text: str, piece: AnswerPiece) -> None:
        # behind a thought that is not shown, the lines that parted it from the answer are not, either
        shown = text if self.think == "show" else piece.text if self._last else piece.text.lstrip("\n")
        if shown:
            self._begin()
            click.echo(shown, nl=False)
            self._last = shown

    def end(self) -> None:
        self._begin()
        if not self._last.endswith("\n"):
            click.echo()
        self._last, self._has_answered = "", True

    def _begin(self) -> None:
        if self._has_answered and not self._last:
            click.echo(self._separator)


class TerminalView:
    """An answer on a terminal, without control characters, which could command it.

    The thought is dim. Where a terminal cannot do more than write lines, it is between its marks, and nothing is rendered.
    """

    def __init__(self, console: Console, look: Look, *, is_markdown: bool = True) -> None:
        self.think: Think = look.think
        self._console = console
        self._rendered = MarkdownStream(console) if is_markdown and not (look.plain or console.is_dumb_terminal) else None
        self._words = WordWrap(lambda: console.width)
        self._status: Status | None = None
        self._in_thought = self._in_answer = False
        self._held = ""  # space at the end of a thought, which may go on
        self._at_start = True  # of a line

    def write(self, text: str, piece: AnswerPiece) -> None:
        if self._console.is_dumb_terminal and self.think == "show":
            self._wrapped(text)
            return
        if piece.reasoning:
            self._think(piece.reasoning)
        # empty lines before an answer part it from a thought, and there is one line of our own
        if text := piece.text if self._in_answer else piece.text.lstrip("\n"):
            self._end_thought()
            self._in_answer = True
            if self._rendered:
                self._rendered.write(printable(text))
            else:
                self._wrapped(text)

    def end(self) -> None:
        if self._status:
            self._status.stop()
            self._status = None
        if self._rendered:
            self._rendered.end()
        self._out(self._words.flush(), "dim" if self._in_thought else None)
        self._in_thought, self._in_answer, self._held = False, False, ""
        if not self._at_start:
            self._wrapped("\n")

    def _think(self, text: str) -> None:
        if self.think == "show":
            self._in_thought = True
            said = (self._held + text).rstrip()
            self._held = (self._held + text)[len(said) :]
            self._wrapped(said, "dim")
        elif self._status is None:
            self._status = self._console.status("thinking")
            self._status.start()

    def _end_thought(self) -> None:
        if self._status:
            self._status.stop()
            self._status = None
        if self._in_thought:
            self._in_thought, self._held = False, ""
            self._out(self._words.flush(), "dim")
            self._wrapped("\n\n")

    def _wrapped(self, text: str, style: str | None = None) -> None:
        self._out(self._words.push(printable(text)), style)

    def _out(self, text: str, style: str | None = None) -> None:
        if text:
            self._console.out(text, style=style, end="", highlight=False)
            self._at_start = text.endswith("\n")
