"""`kvlocal adapt`: what trains, measures and describes adapters for a compressed cache."""

import json
from pathlib import Path

import click

from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal_cli.adapt_distill import ADAPTED_FILE, distill_command, held_out_text
from kvlocal_cli.adapt_eval import eval_command
from kvlocal_cli.adapt_rl import rl_command
from kvlocal_cli.groups import CommandGroup


@click.group("adapt", cls=CommandGroup)
def adapt_group() -> None:
    """Adapters with which a model lives better with a compressed cache: LoRA files that --lora takes."""


for command in (distill_command, rl_command, eval_command):
    adapt_group.add_command(command)


@adapt_group.command("info")
@click.argument("file", type=ADAPTED_FILE)
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
    if as_json:
        click.echo(json.dumps(described | {"record": found.record}, indent=2))
        return
    for name, value in described.items():
        click.echo(f"{name.replace('_', ' '):<14}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    for name in ("steps", "seconds", "device"):
        if name in found.record:
            click.echo(f"{name:<14}{found.record[name]}")
    evaluations = found.record.get("evaluations")
    if evaluations:
        for label, values in (("before", evaluations[0]), ("held out", evaluations[-1])):
            click.echo(f"{label:<14}" + held_out_text({name: value for name, value in values.items() if name != "step"}))
