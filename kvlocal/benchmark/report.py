"""Results of a benchmark as a JSON object and as the cells of a table."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.filesize import decimal

from kvlocal.benchmark.comparison import Comparison
from kvlocal.benchmark.measures import Bench

COLUMNS = ("name", "ours", "other", "unit", "ratio", "95 % interval", "n")


def record(bench: Bench, rows: Iterable[Comparison]) -> dict[str, Any]:
    """{"rows": [...], "settings": {...}}; of the model's path only the file's name."""
    settings = asdict(bench.settings)
    del settings["stock"]
    settings |= {"model": bench.settings.model.name, "cores": os.cpu_count(), "versions": bench.versions}
    return {"rows": [asdict(row) for row in rows], "settings": settings}


def cells(row: Comparison) -> tuple[str, ...]:
    """A line of the table, as COLUMNS has them."""
    unit = "" if row.unit == "bytes" else row.unit
    scatter = ("", "") if row.n == 1 else (f"{row.lo:.3f} .. {row.hi:.3f}", str(row.n))
    return (row.name, _amount(row.ours, row.unit), _amount(row.other, row.unit), unit, f"{row.ratio:.3f}", *scatter)


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return decimal(round(value))
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
