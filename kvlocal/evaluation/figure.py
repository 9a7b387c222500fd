"""Figures that go to a file. Needs the extra "plot"."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")


def check(path: Path) -> None:
    """Raises KvlocalError if nothing can be drawn to that path, before anything is measured."""
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise KvlocalError(f"cannot draw {path}: its name must end in .{', .'.join(FORMATS[:-1])} or .{FORMATS[-1]}")
    if find_spec("matplotlib") is None:
        raise KvlocalError("drawing needs matplotlib, which is not installed: pip install 'kvlocal[plot]'")


def is_figure(path: Path) -> bool:
    """Whether a file is a figure that `save` wrote: the library that draws it names itself in each of the formats.

    Raises:
        OSError: it cannot be read.
    """
    return b"Matplotlib" in path.read_bytes()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes it in the format of the path's ending."""
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix.lower().removeprefix("."), dpi=150)
    atomic_write(path, data.getvalue())
