"""Takes pulled models off the disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from kvlocal.errors import KvlocalError
from kvlocal.files.parts import part_paths
from kvlocal.files.places import models_dir
from kvlocal.hub.catalogue import Catalogue
from kvlocal.hub.hub_file import HubFile

_PROC = Path("/proc")


def was_pulled(path: Path) -> bool:
    """Whether this is where kvlocal puts a model that it pulls, and no link that somebody has put there."""
    places = [*(place for entry in Catalogue.load().entries.values() for place in entry.paths), *(file.path for file in HubFile.pulled())]
    # the name is compared, and not what it leads to: a link beside the models is not one of them
    name = Path(os.path.realpath(path.parent)) / path.name
    return not path.is_symlink() and any(name == Path(os.path.realpath(place.parent)) / place.name for place in places)


def users_of(path: Path) -> list[int]:
    """The ids of other processes that have a model's file mapped, as far as they can be seen; none on systems that do not tell."""
    wanted = {os.path.realpath(part) for part in part_paths(path)}
    found = []
    for process in _PROC.glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with suppress(OSError):
            lines = (process / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
            # the path is the sixth field
            if wanted.intersection(line.split(maxsplit=5)[-1] for line in lines):
                found.append(int(process.name))
    return sorted(found)


def remove(path: Path) -> None:
    """Remove a model's files, of a link the link alone, and the folders of the models directory that are empty then.

    Raises:
        KvlocalError: one of them cannot be removed.
    """
    # without its first file a model in several is not there any more
    for part in [path] if path.is_symlink() else part_paths(path):
        try:
            part.unlink(missing_ok=True)
        except OSError as error:
            raise KvlocalError(f"cannot remove {part} ({error.strerror}): remove it yourself") from error
    hub_folder = models_dir() / "hf"
    for folder in path.parents:
        if hub_folder not in folder.parents:
            break
        with suppress(OSError):  # there is something else in it
            folder.rmdir()
