"""`kvlocal logs`: past conversations, and what was said in them."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import click

from kvlocal.conversations.named_sessions import Session
from kvlocal.conversations.past_chats import Place, beginning, find, past_chats
from kvlocal.errors import KvlocalError
from kvlocal_cli.groups import Command
from kvlocal_cli.terminal import aligned, printable, waiting

_SHOWN = 3  # places of each conversation, in the table


@click.command("logs", cls=Command)
@click.argument("words", nargs=-1, metavar="[WORD]...")
@click.option("-n", "--number", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="Show the newest N.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def logs_command(words: tuple[str, ...], number: int, as_json: bool) -> None:
    """List past sessions and chats, the last used first; with WORDs those in which all of these were said, and where.

    A word is found in any case of letters, also as a part of another; one in quotes may have spaces. What was taken back with /undo is not
    looked at. The name that is shown goes with `kvlocal sessions show`, `chat --session`, `run --session` and `chat --load`, also for a chat that
    nobody has named.
    """
    with waiting("reading what was said"):
        listed = list(islice(((session, found) for session in past_chats() if (found := _find(session, words)) is not None), number + 1))
    shown, is_more = listed[:number], len(listed) > number
    if as_json:
        click.echo(json.dumps({"conversations": [_describe(*each) for each in shown]}, indent=2, ensure_ascii=False))
        return
    if words and not shown:
        raise KvlocalError(f"{' '.join(words)[:60]!r} was said in none of them: `kvlocal logs` lists all")
    for row, (_, found) in zip(aligned([_row(session) for session, _ in shown]), shown, strict=True):
        click.echo(row)
        for place in found[:_SHOWN]:
            click.echo(f"    turn {place.turn}, {'you' if place.role == 'user' else 'answer'}: {printable(place.excerpt)}")
        if len(found) > _SHOWN:
            click.echo(f"    and in {len(found) - _SHOWN} more texts")
    if is_more:
        click.echo(f"kvlocal: there are more: -n {2 * number} shows more", err=True)


def _find(session: Session, words: tuple[str, ...]) -> list[Place] | None:
    """Where the words are, those places first that have the most of them; nothing if no words are asked for, and None if they are not there."""
    if not words:
        return []
    found = find(session.conversation, words) if session.conversation else []
    return sorted(found, key=lambda place: -place.n_words) or None


def _row(session: Session) -> tuple[str, ...]:
    conversation = session.conversation
    used = session.last_used.isoformat(sep=" ", timespec="minutes")
    if conversation is None:
        return used, session.name, "-", "damaged", ""
    model = conversation.model or "-"
    turns = f"{session.n_turns} turn{'' if session.n_turns == 1 else 's'}"
    return used, session.name, Path(model).name if Path(model).is_absolute() else model, turns, printable(beginning(conversation))


def _describe(session: Session, found: list[Place]) -> dict[str, Any]:
    """What `--json` says; None where nothing is known."""
    conversation = session.conversation
    return {
        "name": session.name,
        "kind": "chat" if session.is_chat else "session",
        "model": conversation and conversation.model,
        "turns": session.n_turns if conversation else None,
        "started": conversation and conversation.started,
        "last_used": session.last_used.isoformat(timespec="seconds"),
        "bytes": session.n_bytes,
        "path": str(session.path),
        "begins": beginning(conversation) if conversation else None,
        "found": [{"turn": place.turn, "role": place.role, "text": place.excerpt} for place in found],
    }
