"""Where the value of an option comes from: the command line, else a variable, else the config file, else its default.

Every option has a place in each scope of its command: `eval recall --tokens` in `eval.recall` and `eval`, an option of chat, run, batch or serve in
that command's and in `conversation`. A scope and the option's name are a key of the config file, and the name of a variable.
"""

import copy
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from click.core import ParameterSource

CONVERSATION = "conversation"  # the scope of all commands that hold one
CONVERSATION_COMMANDS = ("chat", "run", "batch", "serve")

_STRENGTH = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT, ParameterSource.PROMPT, ParameterSource.COMMANDLINE)

_Condition = Callable[[Any], bool]
_ARCHIVES: _Condition = ("ram", "disk").__contains__
_WITHOUT_ARCHIVE: dict[str, _Condition] = {"policy": lambda name: name != "recall", "positions": lambda name: name == "cache"}
_ANY: _Condition = bool  # what is not off

# parameters that stand for nothing once another one has such a value and is said more closely than they are: on the command line instead of in a
# variable, or there instead of in the file
_GIVES_WAY: dict[str, dict[str, _Condition]] = {
    "kv_budget": {"kv_memory": _ANY},
    "kv_memory": {"kv_budget": _ANY},
    "kv_ratio": {"policy": lambda name: name == "full"},
    "ratios": {"kv_budget": _ANY},
    "policy": {"archive": _ARCHIVES},
    "policy_args": {"policy": _ANY, "archive": _ARCHIVES},
    "positions": {"archive": _ARCHIVES},
    "archive": _WITHOUT_ARCHIVE,
    **{name: {"archive": lambda store: store == "off", **_WITHOUT_ARCHIVE} for name in ("archive_ram", "archive_dir", "archive_type")},
    "rpc": {"gpu_layers": lambda n: n == 0},
    "session_name": {"goes_on": _ANY, "raw": _ANY, "no_transcript": _ANY},
    "no_transcript": {"session_name": _ANY},
    "goes_on": {"session_name": _ANY, "raw": _ANY},
    "raw": {"session_name": _ANY, "goes_on": _ANY, "system": _ANY},
    "system": {"raw": _ANY},
    "grammar": {"json_schema": _ANY},
    "json_schema": {"grammar": _ANY},
}


def scopes(path: Sequence[str]) -> list[str]:
    """The scopes of the command at this path, the narrowest first."""
    own = [".".join(path[:n]) for n in range(len(path), 0, -1)]
    return [*own, CONVERSATION] if path[0] in CONVERSATION_COMMANDS else own


def variable(scope: str, key: str) -> str:
    """The environment variable for the option of this name in a scope."""
    words = [key] if scope == CONVERSATION else [scope, key]
    return re.sub(r"\W", "_", "_".join(["kvlocal", *words])).upper()


def key_of(option: click.Option) -> str:
    """The name of an option, as the config file has it."""
    return max(option.opts, key=len).lstrip("-")


def settable(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that variables and the config file can have, by their names."""
    options = (param for param in command.params if isinstance(param, click.Option) and param.expose_value)
    return {key_of(option): option for option in options}


def bind_variables(command: click.Command, path: Sequence[str]) -> None:
    """Has the options of a command, and of those below it, look at their variables."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            bind_variables(below, [*path, name])
    for key, option in settable(command).items():
        option.envvar = [variable(scope, key) for scope in scopes(path)]


def path_of(ctx: click.Context) -> list[str]:
    """The words that name the command of a context."""
    path: list[str] = []
    while ctx.parent is not None:
        path.insert(0, ctx.info_name or "")
        ctx = ctx.parent
    return path


def is_given(name: str) -> bool:
    """Whether the parameter of this name is on the command line that is being carried out."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def give_way(ctx: click.Context) -> None:
    """Sets those parameters back to their defaults that stand for nothing beside what was said more closely."""
    strength = {name: _STRENGTH.index(source) for name in ctx.params if (source := ctx.get_parameter_source(name))}
    values = dict(ctx.params)
    for param in ctx.command.params:
        name = param.name or ""
        ways = _GIVES_WAY.get(name, {})
        stronger = max((strength.get(other, 0) for other, holds in ways.items() if holds(values.get(other))), default=0)
        if 0 < strength.get(name, 0) < stronger:
            ctx.params[name] = _default(param)
            ctx.set_parameter_source(name, ParameterSource.DEFAULT)


def _default(param: click.Parameter) -> Any:
    """What a parameter is where nothing is said of it, neither on the command line nor elsewhere."""
    alone = copy.copy(param)
    alone.envvar = None
    return click.Command(None, params=[alone]).make_context("", []).params[param.name or ""]


def variable_of(ctx: click.Context, option: click.Option) -> str | None:
    """The variable that the value of an option comes from, if it comes from one."""
    if ctx.get_parameter_source(option.name or "") is not ParameterSource.ENVIRONMENT:
        return None
    names = [option.envvar] if isinstance(option.envvar, str) else option.envvar or ()
    return next((name for name in names if os.environ.get(name)), None)


def set_elsewhere(ctx: click.Context) -> Iterator[tuple[click.Option, Any]]:
    """The options that have values from variables or from the config file."""
    for option in settable(ctx.command).values():
        if ctx.get_parameter_source(option.name or "") in (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
            yield option, ctx.params.get(option.name or "")
