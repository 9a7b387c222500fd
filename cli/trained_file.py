"""What a file is that training wrote: its values, and how it was trained."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import click


def show_trained_file(
    described: Mapping[str, Any], record: Mapping[str, Any], evaluations: Sequence[tuple[str, Mapping[str, float]]], as_json: bool
) -> None:
    """Prints it.

    record: what the file tells of its training
    evaluations: those of the record that are shown, each with its name
    as_json: as one JSON object, with the whole record
    """
    if as_json:
        click.echo(json.dumps({**described, "record": record}, indent=2))
        return
    for name, value in described.items():
        click.echo(f"{name.replace('_', ' '):<14}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    for name in ("steps", "seconds", "device"):
        if name in record:
            click.echo(f"{name:<14}{record[name]}")
    for name, values in evaluations:
        click.echo(f"{name:<14}" + values_text({key: value for key, value in values.items() if key != "step"}))


def values_text(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items() if not math.isnan(value))
