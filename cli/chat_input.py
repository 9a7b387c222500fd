"""Where the turns of a chat come from: lines typed at a terminal, or piped in."""

import os
import sys
from contextlib import suppress
from typing import Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output.defaults import create_output

from kvlocal.errors import KvlocalError
from kvlocal.files.places import state_dir
from kvlocal_cli.terminal import decode_input

QUOTES = '"""'


class Lines(Protocol):
    """A source of lines."""

    def next(self, *, inside: bool) -> str:
        """The next line, without its end; `inside` a text of several lines.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: the user gave the line up.
        """
        ...


class PipedLines:
    """Standard input, line by line."""

    def next(self, *, inside: bool) -> str:
        line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode_input(line)


class TypedLines:
    """A terminal with line editing, completion by Tab, and a history that outlives the program.

    Args:
        terminal: where the prompt appears.
        completer: what Tab completes.
    """

    def __init__(self, terminal: TextIO, completer: Completer) -> None:
        self._prompt: PromptSession[str] = PromptSession(
            history=_history(),
            completer=completer,
            complete_while_typing=False,
            output=create_output(terminal),
        )

    def next(self, *, inside: bool) -> str:
        return self._prompt.prompt("... " if inside else ">>> ")


class _LineHistory(FileHistory):
    """A history that is lost, and not the chat, when the disk is full."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _history() -> History:
    try:
        directory = state_dir()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / "history"
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except (OSError, KvlocalError):
        return InMemoryHistory()
    return _LineHistory(str(path))


def read_turn(lines: Lines) -> tuple[str, bool]:
    """The next turn, and whether it is text in any case and not a command.

    A line is a turn. From a line that begins with three quotes to one that ends with them, or to the end of the input,
    it is one text, and so is a line that begins with two slashes: it stands for the same line with one.

    Raises:
        EOFError, KeyboardInterrupt: as `Lines.next` does.
    """
    line = lines.next(inside=False)
    if line.startswith("//"):
        return line[1:], True
    if not line.startswith(QUOTES):
        return line, False
    text = [line[len(QUOTES) :]]
    while not text[-1].rstrip().endswith(QUOTES):
        try:
            text.append(lines.next(inside=True))
        except EOFError:
            return "\n".join(text).strip("\n"), True
    text[-1] = text[-1].rstrip()[: -len(QUOTES)]
    return "\n".join(text).strip("\n"), True
