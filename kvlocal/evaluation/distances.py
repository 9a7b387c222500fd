"""Ranges of distances, by which questions are told apart."""

from __future__ import annotations

from itertools import pairwise


class Distances:
    """Ranges of numbers of tokens.

    ends: where each but the last ends, ascending

    names: of the ranges, such as "<500", "500-1000" and ">1000"
    """

    def __init__(self, *ends: int) -> None:
        self._ends = ends
        self.names = (f"<{ends[0]}", *(f"{start}-{end}" for start, end in pairwise(ends)), f">{ends[-1]}")

    def name(self, distance: int) -> str:
        """Of the range that a distance is in."""
        return self.names[sum(distance >= end for end in self._ends)]
