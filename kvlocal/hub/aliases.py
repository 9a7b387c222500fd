"""Names that a person has given to models: each is a small file in the models directory that holds the name it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import atomic_write, cannot_write
from kvlocal.files.places import models_dir

_NAME = re.compile(r"[A-Za-z0-9][\w.:+-]{0,63}", re.ASCII)
_MAX_BYTES = 4096  # of a name that an alias stands for; more is no alias


def is_alias_name(name: str) -> bool:
    """Whether a model can be called so: a word that is neither a file's name nor a hub's place."""
    return _NAME.fullmatch(name) is not None and not name.lower().startswith("hf:") and not name.lower().endswith(".gguf")


def target_of(name: str) -> str | None:
    """What an alias stands for: a name of the catalogue, an `hf:` form or an absolute path; None if there is no such alias."""
    if not is_alias_name(name):
        return None
    try:
        with open(_folder() / name, "rb") as file:
            target = file.read(_MAX_BYTES + 1)
    except OSError:
        return None
    try:
        return target.decode().strip() if len(target) <= _MAX_BYTES else None
    except UnicodeDecodeError:
        return None


def all_aliases() -> Iterator[tuple[str, str]]:
    """Every alias and what it stands for, by name."""
    try:
        names = sorted(path.name for path in _folder().iterdir())
    except OSError:
        return
    for name in names:
        if target := target_of(name):
            yield name, target


def add_alias(name: str, target: str) -> None:
    """From now on `name` stands for `target`.

    Raises:
        KvlocalError: a model cannot be called so, the alias is there already and stands for something else, or it cannot be written.
    """
    if not is_alias_name(name):
        raise KvlocalError(f"a model cannot be called {name!r}: give a word of letters, digits and .:_+- that does not end with .gguf")
    before = target_of(name)
    if before is not None and before != target:
        raise KvlocalError(f"{name} is another name for {before} already: remove it first with `kvlocal rm {name}`")
    try:
        _folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KvlocalError(cannot_write(_folder(), error)) from error
    atomic_write(_folder() / name, target + "\n")


def remove_alias(name: str) -> None:
    """Forget an alias; what it stands for stays.

    Raises:
        KvlocalError: its file cannot be removed.
    """
    path = _folder() / name
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise KvlocalError(f"cannot remove {path} ({error.strerror}): choose another name, or remove it yourself") from error


def _folder() -> Path:
    return models_dir() / "aliases"
