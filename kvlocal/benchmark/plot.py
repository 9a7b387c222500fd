"""Draws speed against history and all ratios with their intervals. Needs the extra "plot"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvlocal.benchmark.comparison import Comparison
from kvlocal.evaluation.figure import check, new_figure, save


def draw(rows: Sequence[Comparison], path: Path) -> None:
    """On the left the speeds of decode and prefill at each history, on the right every ratio but the shares.

    Raises:
        KvlocalError: matplotlib is missing or the file cannot be written.
    """
    check(path)
    figure = new_figure(12, 5)
    speeds, ratios = figure.subplots(1, 2)
    for kind, line in (("decode", "-"), ("prefill", "--")):
        found = [(row.name.removeprefix(f"{kind}@"), row) for row in rows if row.name.startswith(f"{kind}@")]
        points = sorted((int(history), row.ours, row.other) for history, row in found if history.isdigit())
        if points:
            histories, ours, other = zip(*points, strict=True)
            speeds.plot(histories, ours, line, marker="o", color="C0", label=f"{kind}, kvlocal")
            speeds.plot(histories, other, line, marker="o", color="C1", label=f"{kind}, llama.cpp")
            speeds.legend()
    speeds.set(xlabel="tokens of history", ylabel="tokens/s", yscale="log")
    speeds.grid(alpha=0.3)
    compared = [row for row in rows if not row.name.startswith("share.")]
    for y, row in enumerate(compared):
        ratios.errorbar(row.ratio, y, xerr=[[row.ratio - row.lo], [row.hi - row.ratio]], marker="o", color="C0", capsize=2)
    ratios.axvline(1, color="black", linestyle="--", linewidth=1)
    ratios.set_yticks(range(len(compared)), [row.name for row in compared])
    ratios.invert_yaxis()
    ratios.set(xlabel="kvlocal over llama.cpp", xscale="log")
    ratios.grid(alpha=0.3)
    save(figure, path)
