"""`kvlocal models` and `kvlocal pull`."""

import json
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from kvlocal.doctor.memory_estimate import rough_total
from kvlocal.doctor.memory_limits import available_memory
from kvlocal.doctor.model_facts import size_on_disk
from kvlocal.files.places import models_dir
from kvlocal.hub.aliases import all_aliases
from kvlocal.hub.catalogue import Catalogue, Entry
from kvlocal.hub.hub_file import HubFile, HubQuantization
from kvlocal_cli import completing
from kvlocal_cli.fetching import pull_with_progress
from kvlocal_cli.terminal import print_aligned

COLUMNS = ("name", "size", "fits", "licence", "context", "status", "path", "what for")
_LONGEST_NAME = 32  # characters, in a column of a table
_UNTRIED = " (not tried here)"
_STYLES = {"absent": "dim", "damaged": "red"}


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def models_command(as_json: bool) -> None:
    """List the models that can be pulled by name, what is on this machine, and what fits into its memory.

    Whether a model fits is told by the size of its file: with the default KV budget, in the main memory that is free.
    """
    catalogue, free = Catalogue.load(), available_memory()
    models = [_describe(entry, free) for entry in catalogue.entries.values()]
    places = {entry.path for entry in catalogue.entries.values()}
    models += [_describe(hub_file, free) for hub_file in HubFile.pulled() if hub_file.path not in places]
    aliases = dict(all_aliases())
    if as_json:
        report = {"directory": str(models_dir()), "default": catalogue.default, "memory_available": free, "models": models, "aliases": aliases}
        click.echo(json.dumps(report, indent=2))
        return
    rows = [_row(model, catalogue.default) for model in models]
    rows += [(alias, "-", "-", "-", "-", "alias", "-", f"another name for {target}") for alias, target in aliases.items()]
    console = Console(highlight=False)
    if console.is_terminal:
        _print_table(console, rows)
    else:
        print_aligned([COLUMNS, *rows])


def _print_table(console: Console, rows: list[tuple[str, ...]]) -> None:
    """A table that fits into 80 columns, without the licences, of what has short names; paths and names of files are lines of their own, which
    nothing wraps, so that they can be copied."""
    table = Table("name", "size", "fits", "context", "status", "what for", box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = column.header != "what for"
    for name, size, fits, _licence, context, status, _path, summary in rows:
        if len(name) <= _LONGEST_NAME:
            plain = summary.removesuffix(_UNTRIED)
            table.add_row(name, size, fits, context, status if plain == summary else f"{status}, untried", plain, style=_STYLES.get(status))
    console.print(table)
    for name, size, fits, _licence, _context, _status, path, _summary in rows:
        if path != "-":
            click.echo(f"\n{name}{f' ({size}, fits: {fits})' if len(name) > _LONGEST_NAME else ''}\n{path}")


@click.command("pull")
@click.argument("name", shell_complete=completing.models)
@click.option("--force", is_flag=True, help="Fetch the model again although it is here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the path.")
def pull_command(name: str, force: bool, as_json: bool) -> None:
    """Fetch the model NAME and print the path of its GGUF file.

    NAME is one that `kvlocal models` lists, hf:OWNER/REPO/FILE.gguf[@REVISION] for a file of a hub repository, or
    hf:OWNER/REPO:Q4_K_M[@REVISION] for its file with this quantization.
    """
    model = Catalogue.load().find(name)
    here = None if force or isinstance(model, HubQuantization) or not model.present else model.path
    path = here or pull_with_progress(model, force)
    if as_json:
        click.echo(json.dumps({"name": model.name, "path": str(path), "bytes": size_on_disk(path), "fetched": here is None}))
    else:
        click.echo(path)


def _describe(model: Entry | HubFile, free: int | None) -> dict[str, Any]:
    """What `--json` says about a model; None where nothing is known."""
    present, path = model.present, model.path
    status = "present" if present else "damaged" if path and path.exists() else "absent"
    entry = model if isinstance(model, Entry) else None
    size = entry.size if entry and not present else size_on_disk(path) if path else 0
    return {
        "name": model.name,
        "source": "catalogue" if entry else "hub",
        "place": entry and entry.place and entry.place.name,
        "status": status,
        "path": str(path) if present else None,
        "bytes": size,
        "memory": rough_total(size),
        "fits": None if free is None else rough_total(size) <= free,
        "licence": entry and entry.licence,
        "trained_context": entry and entry.trained_context,
        "tried": entry and entry.tried,
        "summary": entry and entry.summary,
    }


def _row(model: dict[str, Any], default: str) -> tuple[str, ...]:
    summary = model["summary"] or "from the hub"
    if model["name"] == default:
        summary += " (the default)"
    if model["tried"] is False:
        summary += _UNTRIED
    return (
        model["name"],
        decimal(model["bytes"]),
        {True: "yes", False: "no", None: "?"}[model["fits"]],
        model["licence"] or "see its page",
        f"{model['trained_context']:,}" if model["trained_context"] else "?",
        model["status"],
        model["path"] or "-",
        summary,
    )
