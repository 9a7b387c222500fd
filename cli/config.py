"""`kvlocal config`: shows and changes what options have by default."""

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click
import tomlkit
from click.shell_completion import CompletionItem

from kvlocal.errors import KvlocalError
from kvlocal.files.places import config_path
from kvlocal_cli.config_file import ConfigFile, all_commands, changing, find_option, names_a_file, options_of
from kvlocal_cli.groups import CommandGroup
from kvlocal_cli.settings import CONVERSATION, key_of, scopes, settable, variable

_HEADER = f"""\
# What the options of kvlocal are by default. [{CONVERSATION}] is for chat, run, batch and serve; [chat], [eval.recall] and the like are for
# one command. `kvlocal config show --all` lists all options.
"""
_SECRET = ("api-key",)


class SettingName(click.ParamType):
    """SCOPE.OPTION, which is completed."""

    name = "setting"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        scope, dot, _ = incomplete.rpartition(".")
        root = ctx.find_root().command
        assert isinstance(root, click.Group)
        if not dot:
            return [CompletionItem(f"{name}.") for name in (CONVERSATION, *root.list_commands(ctx)) if name.startswith(incomplete)]
        names = [f"{scope}.{key}" for key in options_of(root, scope)]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


_setting = click.argument("setting", type=SettingName(), metavar="SETTING")


class Found(NamedTuple):
    """What an option has.

    key: SCOPE.OPTION
    value: None if it has none
    source: where it is from, for a person
    """

    key: str
    value: Any
    source: str


@click.group("config", cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def config_group(ctx: click.Context) -> None:
    """Show and change what options have by default.

    That is what the config file and the environment say.

    A SETTING is a command and one of its options, such as chat.kv-budget or eval.recall.questions; conversation.kv-budget, or kv-budget
    alone, is for chat, run, batch and serve. The command line goes before the environment, this before the config file, and the
    narrower before the wider.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(show_command)


@config_group.command("show")
@click.argument("command", required=False, metavar="[COMMAND]")
@click.option("--all", "everything", is_flag=True, help="Show all options of all commands, with their defaults.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def show_command(command: str | None = None, everything: bool = False, as_json: bool = False) -> None:
    """Show what is set, with where it is from; with COMMAND all options of that command."""
    root = _root()
    file = ConfigFile(root)
    file.check()
    if command or everything:
        found = [each for path, one in all_commands(root) if everything or _is_named(command, path) for each in _effective(file, path, one)]
        if not found:
            raise KvlocalError(f"there is no command {command} with options: `kvlocal --help` lists the commands")
    else:
        found = list(_set(file, root))
    if as_json:
        settings = [{"setting": key, "value": _shown(key, value), "from": source} for key, value, source in found]
        click.echo(json.dumps({"path": str(file.path), "settings": settings}, indent=2, ensure_ascii=False))
    elif found:
        from kvlocal_cli.terminal import print_aligned, printable

        print_aligned([(key, printable(_text(_shown(key, value))).replace("\n", " "), source) for key, value, source in found])
    else:
        click.echo(f"kvlocal: nothing is set: `kvlocal config set chat.kv-budget 512` writes to {file.path}", err=True)
    _warn_of_variables(root)


@config_group.command("get")
@_setting
def get_command(setting: str) -> None:
    """Print what a setting is, wherever that is from."""
    root = _root()
    scope, option = find_option(root, setting)
    file, key = ConfigFile(root), key_of(option)
    path = next(path for path, command in all_commands(root, scope) if scope in scopes(path) and key in settable(command))
    within = scopes(path)[scopes(path).index(scope) :]
    found = _effective_option(file, within, option)
    if found.value is None:
        raise KvlocalError(f"{scope}.{key} is not set, and has no fixed default: see `kvlocal {path[0]} --help`")
    click.echo(_text(found.value))


@config_group.command("set")
@_setting
@click.argument("values", nargs=-1, required=True, metavar="VALUE...")
def set_command(setting: str, values: tuple[str, ...]) -> None:
    """Write a setting to the config file; only an option that can be repeated takes several values."""
    root = _root()
    scope, option = find_option(root, setting)
    if len(values) > 1 and not option.multiple:
        raise click.UsageError(f"{scope}.{key_of(option)} is one value: put a text of several words in quotes")
    kept = [_to_keep(option, value) for value in values]
    try:
        option.process_value(click.Context(click.Command("config set")), kept if option.multiple else kept[0])
    except click.BadParameter as error:
        raise click.UsageError(f"{scope}.{key_of(option)}: {error.message}") from error
    file = ConfigFile(root)
    with changing(file.path) as write:
        _ = file.data  # to be read before it is written
        document = tomlkit.parse(file.text or _HEADER)
        table: Any = document
        for name in scope.split("."):
            table = table.setdefault(name, tomlkit.table())
        table[key_of(option)] = [*map(_typed(option), kept)] if option.multiple else _typed(option)(kept[0])
        write(tomlkit.dumps(document))
    _tell_of_stronger(option, scope)


@config_group.command("unset")
@_setting
def unset_command(setting: str) -> None:
    """Take a setting out of the config file."""
    root = _root()
    scope, option = find_option(root, setting)
    key = key_of(option)
    if key not in ConfigFile(root).table(scope):
        raise KvlocalError(f"{scope}.{key} is not in {config_path()}: `kvlocal config` shows what is set")
    with changing(config_path()) as write:
        document = tomlkit.parse(ConfigFile(root).text)
        names: list[str] = scope.split(".")
        tables: list[Any] = [document]
        for name in names:
            tables.append(tables[-1][name])
        tables[-1].remove(key)
        for name, outer, table in zip(reversed(names), reversed(tables[:-1]), reversed(tables[1:]), strict=True):
            if not tomlkit.dumps(table).strip() and not table.trivia.comment:
                outer.remove(name)
        write(tomlkit.dumps(document))


@config_group.command("path")
def path_command() -> None:
    """Print where the config file is, or would be."""
    click.echo(config_path())


@config_group.command("edit")
def edit_command() -> None:
    """Open the config file in an editor, that of VISUAL or EDITOR, and check what it says then."""
    root = _root()
    file = ConfigFile(root)
    if not file.path.exists():
        with changing(file.path) as write:
            write(_HEADER)
    click.edit(filename=str(file.path))
    ConfigFile(root).check()


def _root() -> click.Group:
    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group)
    return root


def _is_named(command: str | None, path: Sequence[str]) -> bool:
    words = re.split(r"[ .]", command or "")
    return [*path[: len(words)]] == words


def _set(file: ConfigFile, root: click.Group) -> Iterator[Found]:
    """What the environment and the file say, by scope."""
    seen: set[str] = set()
    for path, _ in all_commands(root):
        for scope in reversed(scopes(path)):
            if scope in seen:
                continue
            seen.add(scope)
            for key, option in options_of(root, scope).items():
                in_file = file.table(scope).get(key)
                name = variable(scope, key)
                place = file.where(scope, key) if in_file is not None else ""
                if value := os.environ.get(name):
                    yield Found(f"{scope}.{key}", value, f"{name}, not {place}" if place else name)
                elif in_file is not None:
                    yield Found(f"{scope}.{key}", file.value(scope, option, in_file), place)


def _effective(file: ConfigFile, path: Sequence[str], command: click.Command) -> Iterator[Found]:
    """What each option of a command has."""
    for option in settable(command).values():
        yield _effective_option(file, scopes(path), option)


def _effective_option(file: ConfigFile, within: Sequence[str], option: click.Option) -> Found:
    """within: the scopes that count, the narrowest first"""
    key = key_of(option)
    name = f"{within[0]}.{key}"
    for scope in within:
        if value := os.environ.get(variable(scope, key)):
            return Found(name, value, variable(scope, key))
    for scope in within:
        if key in file.table(scope):
            return Found(name, file.value(scope, option, file.table(scope)[key]), file.where(scope, key))
    ctx = click.Context(click.Command("config"))
    default = option.get_default(ctx)
    given = isinstance(default, str | int | float | tuple | list) and default not in ((), [])
    return Found(name, default if given else None, "default")


def _shown(key: str, value: Any) -> Any:
    return "(not shown)" if value and key.endswith(_SECRET) else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else "-" if value is None else str(value)


def _to_keep(option: click.Option, value: str) -> str:
    """A value as the file keeps it: paths as they are found from everywhere."""
    is_path = isinstance(option.type, click.Path) or (names_a_file(option) and value.startswith((".", "~", os.sep)))
    return os.path.abspath(os.path.expanduser(value)) if is_path and value != "-" else value


def _typed(option: click.Option) -> Any:
    """What makes the value in the file of one that the option takes."""
    if option.is_flag:
        return click.BOOL
    if isinstance(option.type, click.types.IntParamType):
        return int
    return float if isinstance(option.type, click.types.FloatParamType) else str


def _tell_of_stronger(option: click.Option, scope: str) -> None:
    name = variable(scope, key_of(option))
    if os.environ.get(name):
        click.echo(f"kvlocal: {name} is set, and goes before the file", err=True)


def _warn_of_variables(root: click.Group) -> None:
    """Of those that no option looks at, and those with values that theirs does not take."""
    known = {name: option for _, command in all_commands(root) for option in settable(command).values() for name in option.envvar or ()}
    for name in sorted(os.environ):
        if name in known and os.environ[name]:
            option, ctx = known[name], click.Context(click.Command("config"))
            try:
                option.process_value(ctx, option.value_from_envvar(ctx) if option.multiple else os.environ[name])
            except click.BadParameter as error:
                click.echo(f"kvlocal: {name}: --{key_of(option)}: {error.message}", err=True)
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.9) if name.startswith("KVLOCAL_") else []
        if close:
            click.echo(f"kvlocal: {name} is no variable of kvlocal: did you mean {close[0]}?", err=True)
