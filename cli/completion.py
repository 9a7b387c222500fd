"""`kvlocal completion`: has the shell complete by Tab, by click's own mechanism."""

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import atomic_write, cannot_write
from kvlocal.files.places import config_dir
from kvlocal_cli.groups import CommandGroup

_PROGRAM, _VARIABLE = "kvlocal", "_KVLOCAL_COMPLETE"  # as click's script asks the program for what there is
_SHELLS = ("bash", "zsh", "fish")
_LOAD_COMPDEF = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n"  # what zsh completes with, if nothing has loaded it

_shell = click.argument("shell", required=False, type=click.Choice(_SHELLS), metavar="[bash|zsh|fish]")


@click.group("completion", cls=CommandGroup)
def completion_group() -> None:
    """Have the shell complete commands, options, models, sessions and prompts by Tab.

    Without a shell's name it is the one of the variable SHELL.
    """


@completion_group.command("show")
@_shell
def show_command(shell: str | None) -> None:
    """Print the script that does it."""
    click.echo(_script(_chosen(shell)), nl=False)


@completion_group.command("install")
@_shell
def install_command(shell: str | None) -> None:
    """Have new shells load that script: for bash and zsh by a line at the end of ~/.bashrc or ~/.zshrc."""
    shell = _chosen(shell)
    script, rc = _places(shell)
    try:
        script.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KvlocalError(cannot_write(script, error)) from error
    atomic_write(script, _script(shell))
    if rc is None:
        click.echo(f"{script} is written: new shells complete kvlocal")
    elif _add_line(rc, f"[ -f '{script}' ] && . '{script}' # completion of kvlocal"):
        click.echo(f"{script} is written, and a line in {rc} that loads it: new shells complete kvlocal")
    else:
        click.echo(f"{script} is written anew; {rc} loads it already")


def _chosen(shell: str | None) -> str:
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in _SHELLS:
        raise click.UsageError(f"there is no completion for the shell {name or 'of this system'}: name one of {', '.join(_SHELLS)}")
    return name


def _script(shell: str) -> str:
    root, completion = click.get_current_context().find_root().command, get_completion_class(shell)
    assert completion is not None
    script = completion(root, {}, _PROGRAM, _VARIABLE).source()
    return _LOAD_COMPDEF + script.replace("#compdef kvlocal", "", 1).lstrip() if shell == "zsh" else script


def _places(shell: str) -> tuple[Path, Path | None]:
    """Where the script goes, and the file of the shell that has to load it, if one has to."""
    try:
        home = Path.home()
    except RuntimeError as error:
        raise KvlocalError("there is no home directory whose shell could complete: set HOME") from error
    if shell == "fish":
        base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
        return (base if base.is_absolute() else home / ".config") / "fish/completions/kvlocal.fish", None
    rc = home / ".bashrc" if shell == "bash" else Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
    return config_dir() / f"completion.{shell}", rc


def _add_line(rc: Path, line: str) -> bool:
    """Puts a line at the end of a file, whatever else it holds; False if it is there already."""
    try:
        before = rc.read_bytes() if rc.exists() else b""
    except OSError as error:
        raise KvlocalError(f"{rc} cannot be read ({error.strerror}): put this line in it: {line}") from error
    if line.encode() in before.splitlines():
        return False
    end = b"" if not before or before.endswith(b"\n") else b"\n"
    atomic_write(rc, before + end + line.encode() + b"\n", 0o644)
    return True
