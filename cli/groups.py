"""Groups of commands, commands whose options may be set elsewhere, and commands whose arguments are texts."""

import re
from importlib import import_module
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from kvlocal.errors import KvlocalError
from kvlocal_cli import settings
from kvlocal_cli.config_file import ConfigFile

_NUMBER = re.compile(r"-\.?\d")  # how no option begins
_HELP = ("-h", "--help")


class Command(click.Command):
    """A command of whose options those from a variable or the config file give way to what is said more closely, and are named in failures that they
    may have caused."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            settings.give_way(ctx)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KvlocalError, click.UsageError) as error:
            for option, value in settings.set_elsewhere(ctx):
                if _names(str(error), option, value):
                    error.add_note(f"--{settings.key_of(option)} is from {origin(ctx, option)}")
            raise


class TextCommand(Command):
    """A command that takes a negative number for a text, and not for an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with_value = {name for param in self.params if isinstance(param, click.Option) and not param.is_flag for name in param.opts}
        end = args.index("--") if "--" in args else len(args)
        numbers = [i for i in range(end) if _NUMBER.match(args[i]) and not (i and args[i - 1] in with_value)]
        if numbers:
            others = [arg for i, arg in enumerate(args[:end]) if i not in numbers]
            args = [*others, "--", *(args[i] for i in numbers), *args[end + 1 :]]
        return super().parse_args(ctx, args)


class CommandGroup(click.Group):
    """A group that shows its help where no command is named and it does nothing by itself, and that is no failure.

    What its commands get of the config file is looked up when one is carried out.
    """

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not self.invoke_without_command and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name and command and not isinstance(command, click.Group) and not ctx.resilient_parsing:
            path = [*settings.path_of(ctx), name]
            root = ctx.find_root().command
            asks_for_help = any(arg in _HELP for arg in (rest[: rest.index("--")] if "--" in rest else rest))
            if isinstance(root, RootGroup) and path[0] not in root.without_config:
                try:
                    ctx.default_map = {name: ConfigFile(root).defaults(path, command)}
                except KvlocalError:
                    if not asks_for_help:
                        raise
        return name, command, rest


class Lazy(NamedTuple):
    """A command that is loaded when it is needed.

    place: MODULE:NAME
    summary: what it does, the beginning of its own help
    """

    place: str
    summary: str


class RootGroup(CommandGroup):
    """The group of all commands, each of which is loaded when it is needed.

    Args:
        lazy: the commands, by name.
        without_config: names of those that are there for the case that the config file cannot be read.
    """

    def __init__(self, *args: Any, lazy: dict[str, Lazy], without_config: tuple[str, ...] = (), **others: Any) -> None:
        super().__init__(*args, **others)
        self.lazy, self.without_config = lazy, without_config

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        if cmd_name not in self.commands:
            module, _, name = self.lazy[cmd_name].place.partition(":")
            command = getattr(import_module(module), name)
            settings.bind_variables(command, [cmd_name])
            self.commands[cmd_name] = command
        return self.commands[cmd_name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.lazy[name].summary) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        return [*(CompletionItem(name, help=self.lazy[name].summary) for name in names), *click.Command.shell_complete(self, ctx, incomplete)]


def origin(ctx: click.Context, option: click.Option) -> str:
    """The variable or the line of the config file that the value of an option is from; "" if it is from neither."""
    if variable := settings.variable_of(ctx, option):
        return variable
    root, key = ctx.find_root().command, settings.key_of(option)
    if isinstance(root, click.Group) and option in (each for each, _ in settings.set_elsewhere(ctx)):
        file = ConfigFile(root)
        if scope := file.scope_of(settings.path_of(ctx), key):
            return file.where(scope, key)
    return ""


def _names(message: str, option: click.Option, value: Any) -> bool:
    """Whether a message is about the option, or about its value."""
    values = value if isinstance(value, tuple) else [value]
    texts = [*option.opts, *(str(each) for each in values if each is not None and not isinstance(each, bool))]
    return any(re.search(rf"(?<![\w.-]){re.escape(text)}(?![\w-]|\.\w)", message) for text in texts if text)
