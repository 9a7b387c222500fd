"""`kvlocal nexus`: what makes, measures and describes Nexus files."""

from pathlib import Path

import click

from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import resolve
from kvlocal.nexus.file import NexusFile
from kvlocal_cli.groups import CommandGroup
from kvlocal_cli.nexus_eval import eval_command
from kvlocal_cli.nexus_synth import synth_command
from kvlocal_cli.nexus_train import train_command
from kvlocal_cli.trained_file import show_trained_file
from kvlocal_cli.training_run import FILE


@click.group("nexus", cls=CommandGroup)
def nexus_group() -> None:
    """Nexus tokens: trained soft tokens that stand for finished turns of a conversation."""


for command in (synth_command, train_command, eval_command):
    nexus_group.add_command(command)


@nexus_group.command("info")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the whole training record.")
@click.option("-m", "--model", help="Also check that the file was made for this model, a name from the catalogue or a GGUF file.")
def info_command(file: Path, as_json: bool, model: str | None) -> None:
    """Say what the Nexus file FILE holds and how it was trained."""
    found = NexusFile.load(file)
    if model:
        found.check_base(Container(resolve(model)))
    parameters = found.table.size + sum(half.size for pair in found.adapter.values() for half in pair)
    described = {
        "base_name": found.base_name,
        "base_hash": found.base_hash,
        "architecture": found.architecture,
        "k": found.k,
        "n_embd": found.n_embd,
        "rank": found.rank,
        "parameters": parameters,
        "bytes": file.stat().st_size,
        "ratios": list(found.ratios),
        "segment_rule": found.segment_rule,
    }
    evaluations = found.record.get("evaluations", [])
    show_trained_file(described, found.record, [("held out", values) for values in evaluations[-1:]], as_json)
