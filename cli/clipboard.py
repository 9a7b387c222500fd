"""Texts into the clipboard of the machine that a person sits at."""

import base64
import os
from typing import TextIO

import pyperclip

from kvlocal.errors import KvlocalError

_WITHOUT = ("dumb", "linux")  # terminals that take no commands, or have no clipboard


def copy(text: str, terminal: TextIO) -> None:
    """Puts a text into the clipboard: by the programs that a desktop has for that, and by the terminal, which reaches it from another machine too and
    is told in an escape sequence, OSC 52 of xterm's control sequences. No terminal says whether it follows that.

    Raises:
        KvlocalError: there is neither.
    """
    done = False
    if not os.environ.get("SSH_CONNECTION"):
        try:
            pyperclip.copy(text)
            done = True
        except pyperclip.PyperclipException:
            pass
    if os.environ.get("TERM", "dumb") not in _WITHOUT:
        data = base64.b64encode(text.encode("utf-8", "replace")).decode()
        terminal.write(f"\x1b]52;c;{data}\x07")
        terminal.flush()
        done = True
    if not done:
        raise KvlocalError("there is no clipboard here: /save FILE writes the conversation to a file")
