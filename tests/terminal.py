"""A command on a pseudo-terminal, as a person has it, and the screen that it is seen on."""

import os
import pty
import re
import select
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import pyte

WIDTH, HEIGHT = 120, 25
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
_PROMPT = r">>>\x1b[^\n]*\?25h$"


def seen(written: str, width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """The lines that a person sees who scrolls back in a terminal to which this was written, without spaces at their ends."""
    screen = pyte.HistoryScreen(width, height, history=100_000)
    pyte.Stream(screen).feed(written)
    above = ["".join(line[x].data for x in range(width)) for line in screen.history.top]
    return "\n".join(line.rstrip() for line in (*above, *screen.display)).rstrip("\n").split("\n")


class Terminal:
    """`kvlocal` with these arguments, on a terminal of its own; killed at the end if it still runs.

    Args:
        stdout: a file for its standard output instead.

    Attributes:
        output: all it has written so far, escape sequences included.
    """

    def __init__(self, *args: str, env: Mapping[str, str], stdout: Path | None = None) -> None:
        self.output = ""
        self._status: int | None = None
        command = [sys.executable, "-m", "kvlocal_cli", *args]
        # without CPR prompt_toolkit does not ask the terminal where the cursor is
        env = {**env, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": str(WIDTH), "LINES": str(HEIGHT)}
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            try:
                if stdout:
                    os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
                os.execve(command[0], command, env)
            finally:
                os._exit(127)
        termios.tcsetwinsize(self._descriptor, (HEIGHT, WIDTH))

    def type(self, text: str) -> None:
        """Ctrl-C comes no sooner than a person's: one that comes before input() waits, Python tells nobody until something else is typed."""
        if "\x03" in text:
            time.sleep(0.3)
        os.write(self._descriptor, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """What it wrote from now to the first match, without escape sequences."""
        seen, deadline = "", time.monotonic() + seconds
        while not re.search(pattern, seen):
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._descriptor], [], [], left)[0]:
                raise AssertionError(f"no {pattern!r} within {seconds} s in {seen!r}")
            try:
                data = os.read(self._descriptor, 65536).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"it ended without {pattern!r}: {seen!r}") from None
            seen, self.output = seen + data, self.output + data
        return _ESCAPE.sub("", seen).replace("\r", "")

    def wait_for_prompt(self, seconds: float = 120) -> str:
        return self.wait_for(_PROMPT, seconds)

    def seen(self) -> list[str]:
        """The lines on its screen, and above."""
        return seen(self.output)

    def words_behind_prompt(self) -> list[str]:
        """What is on the screen behind the last line that was typed at a prompt."""
        lines = self.seen()
        start = max(i for i, line in enumerate(lines) if line.startswith(">>>"))
        return " ".join(lines[start + 1 :]).split()

    def wait_for_end(self, seconds: float = 60) -> int:
        """Its exit code."""
        deadline = time.monotonic() + seconds
        while True:
            if not select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"it has not ended within {seconds} s")
            try:
                data = os.read(self._descriptor, 65536)
            except OSError:
                break
            if not data:
                break
            self.output += data.decode("utf-8", "replace")
        self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is None:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self._descriptor)
