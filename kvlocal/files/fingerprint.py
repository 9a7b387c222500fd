"""Tells files apart by what they hold, quickly, also those of many gigabytes, and runs by what they depend on."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from kvlocal.files.parts import part_paths

_BLOCK, _N_BLOCKS = 2**20, 16


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and of 16 blocks of 1 MiB spread evenly from its first byte to its last; of all of a small file.

    Of a model in several files, where all are there, that of their fingerprints.
    """
    paths = part_paths(path)
    if len(paths) == 1 or not all(part.is_file() for part in paths):
        return _of_file(path)
    return hashlib.sha256("".join(map(_of_file, paths)).encode()).hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for i in range(_N_BLOCKS):
            file.seek(i * max(0, size - _BLOCK) // (_N_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def run_key(settings: dict[str, Any]) -> str:
    """Names a run by everything its measurements depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
