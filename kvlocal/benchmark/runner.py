"""Runs the measurements that are wanted, one after the other."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Generator, Sequence

from kvlocal.benchmark import busy, measures
from kvlocal.benchmark.comparison import Comparison
from kvlocal.benchmark.measures import Bench
from kvlocal.benchmark.process import BenchmarkError
from kvlocal.benchmark.settings import BenchSettings

_MEASURES = (
    (measures.history_names, measures.measure_history),
    (measures.reading_names, measures.measure_reading),
    (measures.memory_names, measures.measure_memory),
    (measures.cells_names, measures.measure_cells),
    (busy.busy_names, busy.measure_busy),
    (measures.chat_names, measures.measure_chat),
)


def names(settings: BenchSettings) -> list[str]:
    """All there is to measure, in order."""
    return [name for names_of, _ in _MEASURES for name in names_of(settings)]


def select(settings: BenchSettings, only: Sequence[str]) -> list[str]:
    """The names that are meant: one of them, or what several have before the @ or the dot, as "decode" or "share". All for none.

    Raises:
        BenchmarkError: there is no such name.
    """
    known = names(settings)
    if not only:
        return known
    kinds = {name.replace(".", "@").partition("@")[0] for name in known}
    wanted: set[str] = set()
    for name in only:
        if name not in known and name not in kinds:
            close = difflib.get_close_matches(name, [*known, *kinds], 1)
            raise BenchmarkError(f"there is no measurement {name!r}: choose {close[0] if close else ', '.join(known)}")
        wanted |= {name} if name in known else {other for other in known if other.replace(".", "@").partition("@")[0] == name}
    return [name for name in known if name in wanted]


def run(bench: Bench, wanted: Collection[str]) -> Generator[Comparison]:
    """Measures what is wanted (see select) and yields each row as soon as it is known.

    Only one of the processes that are compared computes at any time; all of them end with the iterator, also when it is closed early.

    Raises:
        BenchmarkError: a worker died, or could not do what it was told.
    """
    for names_of, measure in _MEASURES:
        mine = [name for name in names_of(bench.settings) if name in wanted]
        if mine:
            yield from measure(bench, mine)
