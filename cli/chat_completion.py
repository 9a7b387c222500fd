"""What Tab completes in a chat: commands, and what they take."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from kvlocal.conversations.named_sessions import SUFFIX, sessions_dir
from kvlocal.errors import KvlocalError

# what completes the argument of a command, as far as it is typed
Complete = Callable[[str], Iterable[Completion]]


class ChatCompleter(Completer):
    """Completes a line that is a command.

    Args:
        commands: their names with the slash, and what completes their arguments.
    """

    def __init__(self, commands: Mapping[str, Complete]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What may stand at the cursor."""
        line = document.text_before_cursor
        if not line.startswith("/") or line.startswith("//"):
            return
        name, space, argument = line.partition(" ")
        if not space:
            yield from words(self._commands)(name)
        elif name in self._commands:
            yield from self._commands[name](argument.lstrip())


def nothing(argument: str) -> Iterable[Completion]:
    return ()


def words(known: Iterable[str]) -> Complete:
    """One of these words."""

    def complete(argument: str) -> Iterable[Completion]:
        return [Completion(word, -len(argument)) for word in known if word.startswith(argument)]

    return complete


def values(known: Mapping[str, Iterable[str]]) -> Complete:
    """One of these names, and then one of its values."""

    def complete(argument: str) -> Iterable[Completion]:
        name, space, value = argument.partition(" ")
        return words(known.get(name, ()))(value.lstrip()) if space else words(known)(name)

    return complete


def files(argument: str) -> Iterable[Completion]:
    """A path, behind --force if that is there."""
    return PathCompleter(expanduser=True).get_completions(Document(argument.removeprefix("--force ").lstrip()), CompleteEvent())


def sessions_and_files(argument: str) -> Iterable[Completion]:
    """The name of a session, or a path."""
    names: list[str] = []
    with suppress(OSError, KvlocalError):
        names = sorted(path.stem for path in sessions_dir().glob(f"*{SUFFIX}"))
    return [*words(names)(argument), *files(argument)]
