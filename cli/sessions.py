"""`kvlocal sessions`: the conversations that are kept under a name."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from kvlocal.conversations.named_sessions import (
    Session,
    delete,
    existing_path,
    fork,
    markdown,
    new_session_path,
    outside,
    rename,
    session,
    sessions,
)
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.saved_chat import saved
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import PRIVATE, atomic_write
from kvlocal_cli import completing
from kvlocal_cli.chat_commands import open_end
from kvlocal_cli.groups import CommandGroup
from kvlocal_cli.prune import prune_sessions_command
from kvlocal_cli.terminal import is_terminal, print_aligned, printable

COLUMNS = ("name", "model", "turns", "tokens", "last used", "size")

_EXPORTS: dict[str, Callable[[str, Conversation], bytes]] = {
    "markdown": lambda name, conversation: markdown(name, conversation).encode(errors="replace"),
    "json": lambda _, conversation: saved(conversation),
}


@click.group("sessions", cls=CommandGroup)
def sessions_group() -> None:
    """List, show, rename, fork, export, prune and delete conversations that have a name.

    `kvlocal chat --session` keeps them. A session is NAME, one that `list` shows, or FILE, a path with a directory or with the ending .jsonl.
    """


@sessions_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def list_command(as_json: bool) -> None:
    """List the sessions that have a name, the last used first."""
    found = [_describe(one) for one in sessions()]
    if as_json:
        click.echo(json.dumps({"sessions": found}, indent=2))
    elif found:
        print_aligned([COLUMNS, *map(_row, found)])


@sessions_group.command("show")
@click.argument("name", metavar="NAME|FILE", shell_complete=completing.conversations)
def show_command(name: str) -> None:
    """Say what a session is and print its last turn."""
    found, conversation = session(name)
    rows = [*zip(COLUMNS, _row(_describe(found)), strict=True), ("started", conversation.started or "-"), ("path", str(found.path))]
    rows.append(("system", printable(conversation.system or "the model's own")))
    print_aligned(rows)
    for message in conversation.messages[-2:]:
        click.echo(f"\n{'>>> ' if message['role'] == 'user' else ''}{printable(message['content'])}")
    if end := open_end(conversation):
        click.echo(end.removeprefix("; "), err=True)


@sessions_group.command("rename")
@click.argument("name", metavar="NAME|FILE", shell_complete=completing.conversations)
@click.argument("new_name", metavar="NEW_NAME|FILE")
def rename_command(name: str, new_name: str) -> None:
    """Give a session another name."""
    path = new_session_path(new_name)
    rename(existing_path(name), path)
    _say_where(path)


@sessions_group.command("fork")
@click.argument("name", metavar="NAME|FILE", shell_complete=completing.conversations)
@click.argument("new_name", metavar="NEW_NAME|FILE")
@click.option("--turns", type=click.IntRange(min=0), metavar="N", help="Take over your first N turns and their answers; all of them if not given.")
def fork_command(name: str, new_name: str, turns: int | None) -> None:
    """Begin another session with what was said in one, which stays as it is."""
    path = new_session_path(new_name)
    fork(existing_path(name), path, turns)
    _say_where(path)


@sessions_group.command("export")
@click.argument("name", metavar="NAME|FILE", shell_complete=completing.conversations)
@click.option("--format", "kind", type=click.Choice(list(_EXPORTS)), default="markdown", show_default=True,
              help="A text to read, or what /save writes and /load reads.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT", help="Write there instead of to stdout.")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
def export_command(name: str, kind: str, output: Path | None, force: bool) -> None:
    """Write the conversation of a session as Markdown or JSON."""
    found, conversation = session(name)
    content = _EXPORTS[kind](found.name, conversation)
    if output is None:
        click.echo(content, nl=False)
    elif output.exists() and not force:
        raise KvlocalError(f"{output} is there already: name another file or replace it with --force")
    else:
        atomic_write(output, content, PRIVATE)


@sessions_group.command("delete")
@click.argument("name", metavar="NAME|FILE", shell_complete=completing.conversations)
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete_command(name: str, yes: bool) -> None:
    """Delete a session with all that was said in it."""
    path = existing_path(name)
    if not yes:
        if not is_terminal(sys.stdin):
            raise click.UsageError("nobody can be asked: confirm with --yes")
        click.confirm(f"Delete the session {printable(name)} with all that was said in it?", abort=True, err=True)
    delete(path)


sessions_group.add_command(prune_sessions_command)


def _say_where(path: Path) -> None:
    if where := outside(path):
        click.echo(f"kvlocal: the session is{where}", err=True)


def _describe(found: Session) -> dict[str, Any]:
    """What `--json` says about a session; None where nothing is known."""
    conversation = found.conversation
    return {
        "name": found.name,
        "model": conversation.model if conversation else None,
        "turns": found.n_turns if conversation else None,
        "tokens": conversation.n_tokens if conversation else None,
        "last_used": found.last_used.isoformat(timespec="seconds"),
        "bytes": found.n_bytes,
        "path": str(found.path),
    }


def _row(described: dict[str, Any]) -> tuple[str, ...]:
    name, model, turns, tokens = (described[key] for key in ("name", "model", "turns", "tokens"))
    shown = "damaged" if turns is None else str(turns)
    model = "-" if model is None else Path(model).name if Path(model).is_absolute() else model
    used = str(described["last_used"])[:16].replace("T", " ")
    return name, model, shown, "-" if tokens is None else str(tokens), used, decimal(described["bytes"])
