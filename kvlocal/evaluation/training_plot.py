"""Draws how a training run went. Needs the extra "plot"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kvlocal.evaluation.figure import check, new_figure, save

_STRETCHES = 50  # of updates at most, each with its mean, beside the single ones


def draw(what: str, values: Sequence[float], evaluations: Sequence[Mapping[str, float]], path: Path) -> None:
    """What each update had, beside the held-out evaluations.

    Args:
        what: the values' name.
        values: one for each update, not a number where there was none.
        evaluations: each with the `step` behind which it was made, and values by name.

    Raises:
        KvlocalError: matplotlib is missing or the file cannot be written.
    """
    check(path)
    figure = new_figure(11 if evaluations else 6, 4.5)
    panels = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    updates = panels[0]
    steps = np.arange(1, len(values) + 1)
    updates.plot(steps, values, ".", color="0.8")
    stretches = [part for part in np.array_split(np.arange(len(values)), min(_STRETCHES, max(1, len(values)))) if len(part)]
    known = [(steps[part].mean(), np.nanmean(np.asarray(values)[part])) for part in stretches if not np.isnan(np.asarray(values)[part]).all()]
    if known:
        updates.plot(*zip(*known, strict=True), color="C0")
    updates.set(xlabel="update", ylabel=what, ylim=(0, None))
    for held_out in panels[1:]:
        names = dict.fromkeys(name for one in evaluations for name in one if name != "step")
        for i, name in enumerate(names):
            points = [(one["step"], one[name]) for one in evaluations if name in one]
            held_out.plot(*zip(*points, strict=True), marker="osD^v<>pX*"[i % 10], label=name)
        held_out.set(xlabel="update", ylabel=f"held-out {what}", ylim=(0, None))
        figure.legend(*held_out.get_legend_handles_labels(), loc="outside right upper")
    for panel in panels:
        panel.grid(alpha=0.3)
    save(figure, path)
