"""Results as rows, as a table and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvlocal.evaluation.runner import Measurements, Task
from kvlocal.evaluation.statistics import mean_over_chats, shown
from kvlocal.evaluation.variants import Variant


@dataclass(frozen=True)
class MetricRow:
    """One metric of one policy at one ratio.

    policy: its spec
    ratio: share of the history to remove, 0 for the full context
    mean, lo, hi: over all values, and its 95 % bootstrap interval over chats; None where there is one chat
    n: values, of dialogues one a chat, else one a question
    compression: share of the history's cells that were really removed, mean over the chats
    """

    task: str
    policy: str
    ratio: float
    metric: str
    mean: float
    lo: float | None
    hi: float | None
    n: int
    compression: float


def rows(task: Task, variants: Sequence[Variant], results: Measurements, seed: int) -> list[MetricRow]:
    """A row for each variant and metric, in their order; none for what was not measured."""
    found = []
    for variant in variants:
        measured = [measurement for _, measurement in sorted(results.get((variant.spec, variant.ratio), {}).items())]
        for metric in task.metrics:
            values = [measurement.values[metric] for measurement in measured if metric in measurement.values]
            if values:
                estimate = mean_over_chats([sum(chat) for chat in values], [len(chat) for chat in values], seed=seed)
                compression = float(np.mean([measurement.compression for measurement in measured]))
                n = sum(map(len, values))
                found.append(MetricRow(task.name, variant.spec, variant.ratio, metric, *estimate, n, compression))
    return found


def document(found: Sequence[MetricRow], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a run."""
    return {"rows": [asdict(row) for row in found], "settings": settings}


def tables(found: Sequence[MetricRow]) -> list[tuple[list[str], list[list[str]]]]:
    """Headers and lines of tables: one of the metrics over everything, one for each metric that is split as `choice@<500`, with a column for each
    part, and one for each way in which metrics are split as `choice@category=date`, with a line for each part.

    A cell is the mean with its interval, if there is one.
    """
    metrics = list(dict.fromkeys(row.metric for row in found))
    whole = [metric for metric in metrics if "@" not in metric]
    split = [[metric for metric in metrics if metric.startswith(f"{name}@") and "=" not in metric] for name in whole]
    cells = {(row.policy, row.ratio, row.metric): shown(row.mean, row.lo, row.hi) for row in found}
    lines = {(row.policy, row.ratio): f"{row.compression:.1%}" for row in found}
    in_columns = [
        (
            ["policy", "ratio", "removed", *columns],
            [[policy, f"{ratio:g}", removed, *(cells.get((policy, ratio, metric), "") for metric in columns)]
             for (policy, ratio), removed in lines.items()],
        )
        for columns in [whole, *filter(None, split)]
    ]  # fmt: skip
    return in_columns + [_in_lines(found, by, whole, cells) for by in dict.fromkeys(map(_way, metrics)) if by]


def _way(metric: str) -> str:
    """The way in which a metric is split by lines, "" for none."""
    name, equals, _ = metric.partition("@")[2].partition("=")
    return name if equals else ""


def _in_lines(
    found: Sequence[MetricRow], by: str, whole: Sequence[str], cells: dict[tuple[str, float, str], str]
) -> tuple[list[str], list[list[str]]]:
    """A table with a line for each part, all policies of one part together."""
    rows = [row for row in found if _way(row.metric) == by]
    parts = dict.fromkeys(row.metric.partition("=")[2] for row in rows)
    columns = [name for name in whole if any(row.metric.startswith(f"{name}@") for row in rows)]
    lines = []
    for part in parts:
        of_part = [row for row in rows if row.metric.partition("=")[2] == part]
        for policy, ratio in dict.fromkeys((row.policy, row.ratio) for row in of_part):
            n = max(row.n for row in of_part if (row.policy, row.ratio) == (policy, ratio))
            lines.append([part, policy, f"{ratio:g}", str(n), *(cells.get((policy, ratio, f"{name}@{by}={part}"), "") for name in columns)])
    return [by, "policy", "ratio", "n", *columns], lines


def plain(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as text: columns two spaces apart, the first one to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in (headers, *lines)
    )
