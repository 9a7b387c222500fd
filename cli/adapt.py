"""`kvlocal adapt`: what trains, measures and describes adapters for a compressed cache."""

from pathlib import Path

import click

from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal_cli.adapt_distill import distill_command
from kvlocal_cli.adapt_eval import eval_command
from kvlocal_cli.adapt_rl import rl_command
from kvlocal_cli.groups import CommandGroup
from kvlocal_cli.trained_file import show_trained_file
from kvlocal_cli.training_run import FILE


@click.group("adapt", cls=CommandGroup)
def adapt_group() -> None:
    """Adapters with which a model lives better with a compressed cache: LoRA files that --lora takes."""


for command in (distill_command, rl_command, eval_command):
    adapt_group.add_command(command)


@adapt_group.command("info")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the whole training record.")
@click.option("-m", "--model", help="Also check that the file was made for this model, a name from the catalogue or a GGUF file.")
def info_command(file: Path, as_json: bool, model: str | None) -> None:
    """Say what the adapter in FILE is for and how it was trained."""
    from kvlocal.training.adapted_file import AdaptedFile

    found = AdaptedFile.load(file, Container(resolve(model)) if model else None)
    described = {
        "method": found.method,
        "base_name": found.base_name,
        "base_hash": found.base_hash,
        "architecture": found.architecture,
        "rank": found.rank,
        "alpha": found.alpha,
        "parameters": found.n_parameters,
        "bytes": file.stat().st_size,
        "policies": list(found.policies),
        "ratios": list(found.ratios),
    }
    evaluations = found.record.get("evaluations", [])
    shown = [("before", evaluations[0]), ("held out", evaluations[-1])] if evaluations else []
    show_trained_file(described, found.record, shown, as_json)
