"""Draws quality against cells kept. Needs the extra "plot"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvlocal.evaluation.figure import check, new_figure, save
from kvlocal.evaluation.report import MetricRow
from kvlocal.evaluation.variants import FULL

_APART = 0.005  # of the cells: policies that keep equally many stand side by side


def draw(found: Sequence[MetricRow], path: Path) -> None:
    """A panel for each metric that is not split by distance: a line for each policy over the cells it kept, the full context dashed.

    Raises:
        KvlocalError: matplotlib is missing or the file cannot be written.
    """
    check(path)
    metrics = [metric for metric in dict.fromkeys(row.metric for row in found) if "@" not in metric]
    policies = [policy for policy in dict.fromkeys(row.policy for row in found) if policy != FULL.spec]
    figure = new_figure(5 * len(metrics) + 2, 4.5)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for metric, axes in zip(metrics, panels, strict=True):
        for i, policy in enumerate(policies):
            shift = _APART * (i - (len(policies) - 1) / 2)
            of_policy = [row for row in found if (row.policy, row.metric) == (policy, metric)]
            if points := sorted((1 - row.compression + shift, row.mean, *_interval(row)) for row in of_policy):
                kept, mean, lo, hi = zip(*points, strict=True)
                errors = np.maximum([np.subtract(mean, lo), np.subtract(hi, mean)], 0)
                axes.errorbar(kept, mean, errors, label=policy, marker="osD^v<>pX*"[i % 10], color=f"C{i % 10}", capsize=2, alpha=0.8)
        for row in found:
            if (row.policy, row.metric) == (FULL.spec, metric):
                axes.axhline(row.mean, linestyle="--", color="black", linewidth=1, label=FULL.spec)
        axes.set(xlim=(0, 1), xlabel="share of the history's cells kept", ylabel=metric.replace("_", " "))
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    save(figure, path)


def _interval(row: MetricRow) -> tuple[float, float]:
    """From where to where the bar of a mean goes; a single chat has none."""
    return (row.mean, row.mean) if row.lo is None or row.hi is None else (row.lo, row.hi)
