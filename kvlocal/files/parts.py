"""Models in several files: which files belong together, by the names that llama.cpp gives them."""

from __future__ import annotations

import re
from pathlib import Path

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)


def parts_of(name: str) -> list[str]:
    """The names of all files of a model, in order, from that of one: only that, unless it is `stem-00001-of-00003.gguf` or another of these.

    Source: llama_split_path of llama.cpp.
    """
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    stem, number, count, suffix = match.groups()
    if not 1 <= int(number) <= int(count):
        return [name]
    return [f"{stem}-{i:05}-of-{count}{suffix}" for i in range(1, int(count) + 1)]


def part_paths(path: Path) -> list[Path]:
    """Likewise for where they are."""
    return [path.with_name(name) for name in parts_of(path.name)] if path.name else [path]
