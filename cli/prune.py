"""`kvlocal sessions prune` and `kvlocal chats prune`: making room of past conversations."""

import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import click
from rich.filesize import decimal

from kvlocal.conversations.named_sessions import chats_dir, sessions_dir
from kvlocal.conversations.pruning import prunable, prune
from kvlocal.errors import KvlocalError
from kvlocal_cli.groups import Command, CommandGroup
from kvlocal_cli.option_lists import add_options
from kvlocal_cli.terminal import is_terminal, print_aligned

_MOST_SHOWN = 20


class Age(click.ParamType):
    """A time such as 30d: hours, days, weeks or years."""

    name = "age"
    _UNITS: ClassVar[dict[str, float]] = {"h": 1 / 24, "d": 1, "w": 7, "y": 365}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Raises BadParameter if it is something else."""
        if isinstance(value, timedelta):
            return value
        found = re.fullmatch(r"(\d{1,5}) ?([hdwy])", value.strip(), re.ASCII)
        if found is None:
            self.fail(f"{value!r} is no time such as 12h, 30d, 8w or 1y", param, ctx)
        return timedelta(days=int(found[1]) * self._UNITS[found[2]])


_OPTIONS = (
    click.option("--older-than", type=Age(), metavar="TIME", help="Those that were not used for so long: 12h, 30d, 8w, 1y."),
    click.option("--keep", type=click.IntRange(min=0), metavar="N", help="All but the N that were used last."),
    click.option("--transcripts", is_flag=True, help="Remove them with all that was said, and not only what can be computed again."),
    click.option("--dry-run", is_flag=True, help="Show what would go, and remove nothing."),
    click.option("--yes", is_flag=True, help="Do not ask."),
)


def _prune_options(command: Callable[..., None]) -> Callable[..., None]:
    return add_options(command, _OPTIONS)


@click.command("prune", cls=Command)
@_prune_options
def prune_sessions_command(older_than: timedelta | None, keep: int | None, transcripts: bool, dry_run: bool, yes: bool) -> None:
    """Make room: remove the caches of old sessions, with which they are gone on with at once.

    What was said stays, and such a session is read again from it when it is gone on with; --transcripts removes that too. Give --older-than,
    --keep or both. A session that is in use is left alone.
    """
    _prune("session", sessions_dir(), older_than, keep, transcripts, dry_run, yes)


@click.group("chats", cls=CommandGroup)
def chats_group() -> None:
    """Make room of past chats that have no name. `kvlocal logs` lists them."""


@chats_group.command("prune")
@_prune_options
def prune_chats_command(older_than: timedelta | None, keep: int | None, transcripts: bool, dry_run: bool, yes: bool) -> None:
    """Make room: remove the caches of old chats, with which they are gone on with at once.

    What was said stays, and such a chat is read again from it when it is gone on with; --transcripts removes that too. Give --older-than,
    --keep or both. A chat that is in use is left alone. Without a word only the five chats that were used last keep their caches.
    """
    _prune("chat", chats_dir(), older_than, keep, transcripts, dry_run, yes)


def _prune(kind: str, directory: Path, older_than: timedelta | None, keep: int | None, transcripts: bool, dry_run: bool, yes: bool) -> None:
    if older_than is None and keep is None:
        raise click.UsageError(f"which {kind}s are old has to be said: give --older-than 30d, or --keep 10 for all but the last ten")
    found = [one for one in prunable(directory, older_than=older_than, keep=keep or 0) if transcripts or one.cache_bytes]
    if not (dry_run or yes or is_terminal(sys.stdin)):
        raise click.UsageError("nobody can be asked: confirm with --yes, or look first with --dry-run")
    if not found:
        click.echo(f"kvlocal: there is nothing to remove of such {kind}s", err=True)
        return
    frees = {one: one.cache_bytes + (one.transcript_bytes if transcripts else 0) for one in found}
    rows = [(one.path.stem, one.last_used.isoformat(sep=" ", timespec="minutes"), decimal(frees[one])) for one in found]
    print_aligned([(kind, "last used", "frees"), *(rows if dry_run else rows[:_MOST_SHOWN])])
    if len(rows) > _MOST_SHOWN and not dry_run:
        click.echo(f"and {len(rows) - _MOST_SHOWN} more")
    what = f"{len(found)} {kind}{'' if len(found) == 1 else 's'}"
    size = decimal(sum(frees.values()))
    if dry_run:
        click.echo(f"{size} would be freed of {what}; {'all that was said in them would go' if transcripts else 'what was said stays'}")
        return
    if not yes:
        question = f"Delete {what} with all that was said ({size})?" if transcripts else f"Remove the caches of {what} ({size})? What was said stays."
        click.confirm(question, abort=True, err=True)
    freed = 0
    for one in found:
        try:
            freed += prune(one, transcript=transcripts)
        except KvlocalError as error:
            click.echo(f"kvlocal: {error}", err=True)
    click.echo(f"{decimal(freed)} freed; {'what was said in them is gone too' if transcripts else 'what was said stays'}")
