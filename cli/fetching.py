"""Models that are fetched: with progress, and at their first use if a person agrees."""

import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kvlocal.doctor.memory_estimate import rough_total
from kvlocal.doctor.memory_limits import available_memory
from kvlocal.files.places import models_dir
from kvlocal.hub.catalogue import Catalogue, Entry, NotPulled
from kvlocal.hub.client import find
from kvlocal.hub.hub_file import HubFile, HubQuantization
from kvlocal.hub.pull import pull
from kvlocal_cli.progress import REPORT_SECONDS
from kvlocal_cli.terminal import is_terminal, waiting


def located(name: str, agreed: bool) -> Path:
    """The file of the model that a command is asked to use; one that has a name and is not here yet is pulled if the person agrees.

    agreed: pull it without a question

    Raises:
        NotPulled: it is not here and nobody can be asked.
        KvlocalError: there is no such model, or it cannot be pulled.
        click.Abort: the person does not agree.
    """
    catalogue = Catalogue.load()
    try:
        return catalogue.resolve(name)
    except NotPulled as error:
        outputs = [stream for stream in (sys.stderr, sys.stdout) if is_terminal(stream)]
        can_ask = is_terminal(sys.stdin) and bool(outputs)
        if not agreed and not can_ask:
            raise NotPulled(f"{error}, or give --yes") from None
    model = catalogue.find(name)
    if not agreed:
        file, size, what = _known(model)
        if not click.confirm(f"{name} is not on this machine yet. Pull {file} ({what})?{_warning(size)}", default=True, err=outputs[0] is sys.stderr):
            raise click.Abort
    return pull_with_progress(model)


def _known(model: Entry | HubFile | HubQuantization) -> tuple[str, int | None, str]:
    """What would be pulled, how many bytes that is, and what to say about it."""
    if isinstance(model, Entry):
        tried = "" if model.tried else ", not tried with kvlocal yet"
        file = f"{model.name} from {model.place.repository}" if model.place else model.name
        return file, model.size, f"{decimal(model.size)}, {model.licence}{tried}"
    with waiting("asking the hub"):
        found = find(model)
    return found.file.name, found.size, decimal(found.size) if found.size else "of unknown size"


def _warning(size: int | None) -> str:
    free = available_memory()
    if size is None or free is None or rough_total(size) <= free:
        return ""
    return f" It takes about {decimal(rough_total(size))} of memory and {decimal(free)} are free."


def pull_with_progress(model: Entry | HubFile | HubQuantization, force: bool = False) -> Path:
    """Fetch a model and show on stderr how far that is: with a bar on a terminal, else in lines.

    Raises:
        KvlocalError: as `pull` does.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(f"pulling {model.name} into {models_dir()}", err=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
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
