"""The config file: values of options, by scope and name, in TOML."""

import difflib
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import PRIVATE, atomic_write, cannot_write
from kvlocal.files.lock import NoLocks, open_locked
from kvlocal.files.places import config_path
from kvlocal.files.text import text_of
from kvlocal_cli.settings import CONVERSATION, CONVERSATION_COMMANDS, key_of, scopes, settable

_NAMES_A_FILE = ("FILE", "DIR", "MODEL")  # metavars of values in which ~ is the home directory


class ConfigError(KvlocalError):
    """The config file cannot be used as it is."""


class ConfigFile:
    """What the config file says.

    Args:
        path: of the file, which need not be there.
        root: the group of all commands.

    Raises:
        ConfigError: by what reads it, if it is no TOML, or says what no option stands for.
    """

    def __init__(self, root: click.Group, path: Path | None = None) -> None:
        self.path = config_path() if path is None else path
        self._root = root

    @cached_property
    def text(self) -> str:
        """All of it; "" if it is not there."""
        try:
            return text_of(self.path.read_bytes())
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise ConfigError(f"the config file {self.path} cannot be read ({error.strerror}): make it readable, or move it away") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the config file {self.path} is no text in UTF-8: correct it with `kvlocal config edit`") from error

    @cached_property
    def data(self) -> dict[str, Any]:
        """The tables of the file, by scope."""
        try:
            found = tomllib.loads(self.text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            said = str(error)[:1].lower() + str(error)[1:]
            raise ConfigError(f"the config file {self.path} is no TOML, {said}: correct it with `kvlocal config edit`") from error
        for name, table in found.items():
            known = [CONVERSATION, *self._root.list_commands(click.Context(self._root))]
            if not isinstance(table, dict):
                raise self._wrong([name], f"{name} belongs to no command: write it below [{CONVERSATION}], or below the name of a command")
            if name not in known:
                raise self._wrong([name], f"there is no command {name}{_nearest(name, known)}")
        return found

    def table(self, scope: str) -> dict[str, Any]:
        """What the file says in a scope, by the names of options; without the tables in it."""
        found: Any = self.data
        for name in scope.split("."):
            found = found.get(name, {})
            if not isinstance(found, dict):
                raise self._wrong(scope.split("."), f"{scope} is a command: write [{scope}] above the options of it")
        return {key: value for key, value in found.items() if not isinstance(value, dict)}

    def defaults(self, path: Sequence[str], command: click.Command) -> dict[str, Any]:
        """What the options of a command have instead of their defaults, by their parameters' names, as click's `default_map` takes them.

        Raises:
            ConfigError: as above; there is no such option, or it does not take a value of this kind.
        """
        options, found = settable(command), {}
        self._check_tables(path)
        for scope in reversed(scopes(path)):
            for key, value in self.table(scope).items():
                if key in options:
                    found[options[key].name or ""] = self.value(scope, options[key], value)
                elif key not in (known := {**options, **options_of(self._root, scope)}):
                    raise self._wrong([*scope.split("."), key], f"{scope} has no option {key}{_nearest(key, known)}")
        return found

    def _check_tables(self, path: Sequence[str]) -> None:
        """Raises ConfigError if there is a table in one of a command or of a group of commands that is no command's."""
        for name in (path[0], CONVERSATION) if path[0] in CONVERSATION_COMMANDS else (path[0],):
            command = None if name == CONVERSATION else self._root.get_command(click.Context(self._root), name)
            below = command.commands if isinstance(command, click.Group) else {}
            for key, value in self.data.get(name, {}).items():
                if isinstance(value, dict) and key not in below:
                    raise self._wrong([name, key], f"{name} has no command {key}{_nearest(key, below)}")
                for inner, deeper in value.items() if isinstance(value, dict) else ():
                    if isinstance(deeper, dict):
                        raise self._wrong([name, key, inner], f"{name} {key} has no command {inner}")

    def value(self, scope: str, option: click.Option, value: Any) -> Any:
        """A value of the file as an option takes it.

        Raises:
            ConfigError: the option takes none of this kind.
        """
        keys = [*scope.split("."), key_of(option)]
        if option.is_flag:
            if not isinstance(value, bool):
                raise self._wrong(keys, f"{'.'.join(keys)} is on or off: write true or false")
            return value
        if option.multiple:
            return [self._text(keys, option, each) for each in (value if isinstance(value, list) else [value])]
        return self._text(keys, option, value)

    def _text(self, keys: Sequence[str], option: click.Option, value: Any) -> str:
        if isinstance(value, list | dict):
            raise self._wrong(keys, f"{'.'.join(keys)} is one value: write a text or a number")
        if isinstance(value, bool) and isinstance(option.type, click.Choice) and {"on", "off"} <= {*option.type.choices}:
            return "on" if value else "off"
        if isinstance(value, bool):
            return "true" if value else "false"
        return os.path.expanduser(value) if isinstance(value, str) and names_a_file(option) else str(value)

    def check(self) -> None:
        """Looks at all of it, also at what is for other commands.

        Raises:
            KvlocalError: it cannot be used as it is, or a value is wrong.
        """
        for path, command in all_commands(self._root):
            ctx = click.Context(command)
            for name, value in self.defaults(path, command).items():
                option = next(option for option in settable(command).values() if option.name == name)
                try:
                    option.process_value(ctx, value)
                except click.UsageError as error:
                    key = key_of(option)
                    raise ConfigError(f"{self.where(self.scope_of(path, key) or '', key)}: --{key}: {error.message}") from error

    def scope_of(self, path: Sequence[str], key: str) -> str | None:
        """The narrowest scope of a command in which the file has the option of this name; None if it has not."""
        return next((scope for scope in scopes(path) if key in self.table(scope)), None)

    def where(self, scope: str, key: str) -> str:
        """The place of a value in the file, for a sentence."""
        return self._place([*scope.split("."), key])

    def _place(self, keys: Sequence[str]) -> str:
        number = line_of(self.text, keys)
        return f"line {number} of {self.path}" if number else str(self.path)

    def _wrong(self, keys: Sequence[str], what: str) -> ConfigError:
        return ConfigError(f"{self._place(keys)}: {what}")


def names_a_file(option: click.Option) -> bool:
    """Whether the value of an option may be a path."""
    return isinstance(option.type, click.Path) or any(word in (option.metavar or "") for word in _NAMES_A_FILE)


def line_of(text: str, keys: Sequence[str]) -> int | None:
    """The number of the line in which the value at these keys of a TOML text begins, from 1 on; None if it has none.

    The beginnings of the text are read one after another: the value is in the first one that has it, behind the last one without it.
    """
    lines, before = text.split("\n"), 0
    for number in range(1, len(lines) + 1):
        try:
            found: Any = tomllib.loads("\n".join(lines[:number]))
        except tomllib.TOMLDecodeError:
            continue  # it ends within a value
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            return before + 1
        before = number
    return None


def all_commands(root: click.Group, scope: str | None = None) -> Iterator[tuple[list[str], click.Command]]:
    """Every command that is no group, with the words that name it; no more than may be in a scope, if one is given."""
    ctx = click.Context(root)
    first = CONVERSATION_COMMANDS if scope == CONVERSATION else scope and (scope.partition(".")[0],)
    for name in first or root.list_commands(ctx):
        command = root.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from (([name, *path], below) for path, below in all_commands(command))
        elif command is not None:
            yield [name], command


def options_of(root: click.Group, scope: str) -> dict[str, click.Option]:
    """The options of all commands that a scope is one of, by their names."""
    found: dict[str, click.Option] = {}
    for path, command in all_commands(root, scope):
        if scope in scopes(path):
            found = {**settable(command), **found}
    return found


def find_option(root: click.Group, text: str) -> tuple[str, click.Option]:
    """The scope and the option that SCOPE.OPTION names; an option alone is one of the scope `conversation`.

    Raises:
        ConfigError: there is no such scope, or no such option in it; the sentence proposes the closest one.
    """
    scope, dot, key = text.strip().replace("--", "").rpartition(".")
    scope, key = (scope or CONVERSATION).replace(" ", "."), key.replace("_", "-")
    known = {scope for path, _ in all_commands(root) for scope in scopes(path)}
    if scope not in known:
        raise ConfigError(f"there is no command {scope}{_nearest(scope, known)}")
    options = options_of(root, scope)
    if key not in options:
        what = f"{scope} has no option {key}" if dot else f"there is no option {key} of a conversation; one of another command is COMMAND.{key}"
        raise ConfigError(f"{what}{_nearest(key, options)}")
    return scope, options[key]


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ": `kvlocal config show --all` lists all there are"


@contextmanager
def changing(path: Path) -> Iterator[Callable[[str], None]]:
    """While nobody else changes the file at this path by such a block, a function that replaces all of it; its directory is made if need be.

    Raises:
        KvlocalError: it cannot be written; it is then as it was.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise KvlocalError(f"{target} is no file that could be written: name another one by KVLOCAL_CONFIG")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = open_locked(target, os.O_RDWR | os.O_CREAT, PRIVATE, wait=True)
        except NoLocks:
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT, PRIVATE)
    except OSError as error:
        raise KvlocalError(cannot_write(target, error)) from error
    try:
        yield lambda text: atomic_write(target, text, PRIVATE)
    finally:
        os.close(descriptor)
