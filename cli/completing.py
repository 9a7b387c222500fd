"""What the shell proposes for an argument: models, sessions, chats and prompts by name, and files.

This runs at every press of the Tab key, so it loads neither the library nor numpy.
"""

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem

from kvlocal.errors import KvlocalError
from kvlocal.files.places import prompts_dir, state_dir
from kvlocal.hub.aliases import all_aliases
from kvlocal.hub.catalogue import Catalogue
from kvlocal.hub.hub_file import HubFile

_TRANSCRIPTS = "*.jsonl"


def models(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of models, those on this machine first, or a file."""
    try:
        entries = sorted(Catalogue.load().entries.values(), key=lambda entry: not entry.present)
        names = dict.fromkeys(alias for alias, _ in all_aliases()) | {entry.name: entry.summary for entry in entries}
        names |= dict.fromkeys(file.name for file in HubFile.pulled())
    except KvlocalError:
        names = {}
    return _or_file([CompletionItem(name, help=said) for name, said in names.items() if name.startswith(incomplete)])


def sessions(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of sessions, or a file."""
    return _or_file(_items(_stems("sessions"), incomplete))


def conversations(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of sessions and of chats, or a file."""
    return _or_file(_items([*_stems("sessions"), *_stems("chats")], incomplete))


def prompts(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of prompts."""
    try:
        return _items((path.stem for path in sorted(prompts_dir().glob("*")) if path.suffix in (".txt", ".md")), incomplete)
    except (KvlocalError, OSError):
        return []


def files(_ctx: click.Context, _param: click.Parameter, _incomplete: str) -> list[CompletionItem]:
    """A file."""
    return [CompletionItem("", type="file")]


def _stems(place: str) -> list[str]:
    """The newest first."""
    try:
        return sorted((path.stem for path in (state_dir() / place).glob(_TRANSCRIPTS)), reverse=place == "chats")
    except (KvlocalError, OSError):
        return []


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _or_file(items: list[CompletionItem]) -> list[CompletionItem]:
    return items or [CompletionItem("", type="file")]
