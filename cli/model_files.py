"""`kvlocal show`, `kvlocal rm` and `kvlocal cp`: what a model is, and under which names it is on this machine."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from kvlocal.doctor.model_facts import model_facts, size_on_disk
from kvlocal.errors import KvlocalError
from kvlocal.hub.aliases import add_alias, all_aliases, remove_alias, target_of
from kvlocal.hub.catalogue import Catalogue, Entry, NotPulled
from kvlocal.hub.hub_file import HubQuantization
from kvlocal.hub.removal import remove, users_of, was_pulled
from kvlocal_cli import completing
from kvlocal_cli.terminal import is_terminal


@click.command("show")
@click.argument("name", shell_complete=completing.models)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def show_command(name: str, as_json: bool) -> None:
    """Say what the model NAME is: how large, how it is quantized, what its KV cache costs, and where its file is.

    NAME is one that `kvlocal models` lists, an alias, an hf: name or the path of a GGUF file. Nothing is loaded;
    `kvlocal doctor NAME` loads the model and says what fits into memory.
    """
    catalogue = Catalogue.load()
    entry = catalogue.entries.get(catalogue.meant(name))
    try:
        facts = model_facts(catalogue.resolve(name))
    except NotPulled:
        if entry is None:
            raise
        facts = None
    report = _report(name, catalogue.meant(name), entry, facts)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    for label, value in _rows(report, facts):
        click.echo(f"{label:<16}{value}")


def _report(name: str, meant: str, entry: Entry | None, facts: dict[str, Any] | None) -> dict[str, Any]:
    """All that is known; the keys of `model_facts` only of a model that is here."""
    known = facts or {"bytes": entry and entry.size, "trained_context": entry and entry.trained_context}
    return {
        "name": name,
        "alias_of": meant if meant != name else None,
        "present": facts is not None,
        "place": entry and entry.place and entry.place.name,
        "tried": entry and entry.tried,
        **known,
        "licence": entry.licence if entry else known.get("licence"),
    }


def _rows(report: dict[str, Any], facts: dict[str, Any] | None) -> list[tuple[str, str]]:
    rows = [("name", f"{report['name']}, another name for {report['alias_of']}" if report["alias_of"] else report["name"])]
    if facts is None:
        rows.append(("file", f"not on this machine: run `kvlocal pull {report['alias_of'] or report['name']}`"))
    else:
        of_several = f", the first of {facts['files']}" if facts["files"] > 1 else ""
        rows.append(("file", f"{facts['path']}{of_several}"))
    if report["place"]:
        rows.append(("place", report["place"]))
    rows.append(("size", decimal(report["bytes"])))
    if facts is not None:
        window = f", sliding window {facts['sliding_window']:,}" if facts["sliding_window"] else ""
        rows += [
            ("architecture", f"{facts['architecture'] or 'unknown'}{', ' + facts['title'] if facts['title'] else ''}"),
            ("parameters", f"{facts['parameters'] / 1e6:,.0f} M"),
            ("quantization", facts["quantization"] or "unknown"),
        ]
        if facts["heads"]:
            recurrent = f", {facts['recurrent_layers']} of them recurrent" if facts["recurrent_layers"] else ""
            heads = f"{facts['heads']} heads, {facts['kv_heads']} KV heads of {facts['head_size']}"
            rows.append(("layers", f"{facts['layers']}{recurrent}, {heads}{window}"))
    if report["trained_context"]:
        rows.append(("trained context", f"{report['trained_context']:,} tokens"))
    if facts is not None:
        if costs := facts["kv_bytes_per_token"]:
            kept = f"; layers with a window keep {facts['sliding_window']:,} tokens" if facts["sliding_window"] else ""
            rows.append(("KV of a token", ", ".join(f"{kind} {decimal(size)}" for kind, size in costs.items() if size) + kept))
        rows += [
            ("chat template", "in the file" if facts["template"] else "none: it was most likely not trained to chat"),
            ("compressible", "yes" if facts["compressible"] else f"no: {facts['why_not']}"),
            ("can recall", "yes" if facts["recalls"] else f"no: {facts['why_not']}"),
        ]
    rows.append(("licence", report["licence"] or "the file does not say"))
    if report["tried"] is False:
        rows.append(("tried", "not with kvlocal"))
    return rows


@click.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=completing.models)
@click.option("-y", "--yes", is_flag=True, help="Remove without a question.")
@click.option("--force", is_flag=True, help="Also a file that kvlocal has not pulled, or that is in use. Of a link the link alone goes.")
def rm_command(names: tuple[str, ...], yes: bool, force: bool) -> None:
    """Remove models that were pulled, or aliases, whose models stay.

    NAME is one that `kvlocal models` lists, an alias or an hf: name. A file that kvlocal has not pulled stays unless its path
    is given with --force.
    """
    # all that is wrong is said before anything is gone
    paths = {name: None if target_of(name) else _removable(name, force) for name in names}
    if not yes and any(paths.values()) and not is_terminal(sys.stdin):
        raise KvlocalError("nobody can be asked here whether to remove it: give --yes")
    for name, path in paths.items():
        if path is None:
            target = target_of(name)
            remove_alias(name)
            click.echo(f"{name} is forgotten; {target} stays")
            continue
        what = "the link alone" if path.is_symlink() else decimal(size_on_disk(path))
        if not yes and not click.confirm(f"Remove {name} ({what}): {path}?", err=not is_terminal(sys.stdout)):
            click.echo(f"{name} stays")
            continue
        remove(path)
        still = [alias for alias, target in all_aliases() if Catalogue.load().meant(name) == target]
        click.echo(f"removed {path}" + (f"; {', '.join(still)} still means it" if still else ""))


def _removable(name: str, force: bool) -> Path:
    """Where the model is.

    Raises:
        KvlocalError: it is not here, or must not be removed.
    """
    catalogue = Catalogue.load()
    if catalogue.is_name(name):
        model = catalogue.find(name)
        paths = [] if isinstance(model, HubQuantization) else model.paths
        if not any(map(os.path.lexists, paths)):
            raise KvlocalError(f"{name} is not on this machine: there is nothing to remove")
        path, pulled = paths[0], not paths[0].is_symlink()
    else:
        path = catalogue.resolve(name).absolute()
        pulled = was_pulled(path)
    if not force and not pulled:
        what = "is a link" if path.is_symlink() else "is a file"
        raise KvlocalError(f"{path} {what} that kvlocal has not put there: remove it yourself, or give --force")
    if not force and (users := users_of(path)):
        raise KvlocalError(f"{name} is in use by process {', '.join(map(str, users))}: end it first, or give --force")
    return path


@click.command("cp")
@click.argument("name", shell_complete=completing.models)
@click.argument("alias")
def cp_command(name: str, alias: str) -> None:
    """Give the model NAME another name, ALIAS, that can be used wherever its name can.

    The file is not copied. `kvlocal rm ALIAS` takes the alias away again.
    """
    catalogue = Catalogue.load()
    if alias in catalogue.entries:
        raise KvlocalError(f"{alias} is a name of the catalogue already: choose another one")
    target = catalogue.meant(name)
    if catalogue.is_name(target):
        catalogue.find(target)  # an hf: name has to have its form
    else:
        target = str(catalogue.resolve(name).absolute())
    add_alias(alias, target)
    click.echo(f"{alias} is another name for {target}")
