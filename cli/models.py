"""`kvlocal models` and `kvlocal pull`."""

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from kvlocal.files.places import models_dir
from kvlocal.hub.catalogue import Catalogue, Entry, HubFile
from kvlocal.hub.pull import pull
from kvlocal_cli import completing
from kvlocal_cli.progress import REPORT_SECONDS
from kvlocal_cli.terminal import print_aligned

COLUMNS = ("name", "size", "licence", "status", "path", "what for")


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def models_command(as_json: bool) -> None:
    """List the models that can be pulled by name, and what is on this machine."""
    catalogue = Catalogue.load()
    models = [_describe(entry) for entry in catalogue.entries.values()]
    models += [_describe(hub_file) for hub_file in HubFile.pulled()]
    if as_json:
        report = {"directory": str(models_dir()), "default": catalogue.default, "models": models}
        click.echo(json.dumps(report, indent=2))
        return
    rows = [_row(model, catalogue.default) for model in models]
    console = Console()
    if console.is_terminal:
        # Paths are too long for a column of their own.
        table = Table("name", "size", "licence", "status", "what for, path", box=None, pad_edge=False)
        for column in table.columns:
            column.overflow = "fold"
        for name, size, licence, status, path, summary in rows:
            if status == "present":
                table.add_row(name, size, licence, status, f"{summary}\n{path}")
            else:
                table.add_row(name, size, licence, status, summary, style="dim")
        console.print(table)
    else:
        print_aligned([COLUMNS, *rows])


@click.command("pull")
@click.argument("name", shell_complete=completing.models)
@click.option("--force", is_flag=True, help="Fetch the model again although it is here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the path.")
def pull_command(name: str, force: bool, as_json: bool) -> None:
    """Fetch the model NAME and print the path of its GGUF file.

    NAME is one that `kvlocal models` lists, or hf:OWNER/REPO/FILE.gguf[@REVISION] for a file of a hub repository.
    """
    model = Catalogue.load().find(name)
    fetch = force or not model.present
    if fetch:
        path = _pull_with_progress(model, force)
    else:
        path = model.path
    if as_json:
        click.echo(json.dumps({"name": model.name, "path": str(path), "bytes": path.stat().st_size, "fetched": fetch}))
    else:
        click.echo(path)


def _pull_with_progress(model: Entry | HubFile, force: bool) -> Path:
    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(f"pulling {model.name} into {models_dir()}", err=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    reported = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def show(what: str, done: int, total: int | None) -> None:
            nonlocal reported
            bar.update(task, description=f"{what} {model.name}", completed=done, total=total)
            if not console.is_terminal and time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                of = f" of {decimal(total)}" if total else ""
                click.echo(f"{what} {model.name}: {decimal(done)}{of}", err=True)

        return pull(model, force=force, progress=show)


def _describe(model: Entry | HubFile) -> dict[str, Any]:
    """What `--json` says about a model; None where nothing is known."""
    present = model.present
    status = "present" if present else "damaged" if model.path.exists() else "absent"
    entry = model if isinstance(model, Entry) else None
    return {
        "name": model.name,
        "source": "catalogue" if entry else "hub",
        "status": status,
        "path": str(model.path) if present else None,
        "bytes": entry.size if entry else model.path.stat().st_size,
        "licence": entry and entry.licence,
        "trained_context": entry and entry.trained_context,
        "summary": entry and entry.summary,
    }


def _row(model: dict[str, Any], default: str) -> tuple[str, ...]:
    summary = model["summary"] or "from the hub"
    if model["name"] == default:
        summary += " (the default)"
    return (
        model["name"],
        decimal(model["bytes"]),
        model["licence"] or "see its page",
        model["status"],
        model["path"] or "-",
        summary,
    )
