"""Which Nexus file goes with a model: one that was named, or one that lies where it is looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from kvlocal.errors import KvlocalError
from kvlocal.files.places import models_dir
from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import shipped_dir
from kvlocal.llama.model import Model
from kvlocal.nexus.file import NexusFile, WrongBase
from kvlocal.nexus.tokens import NexusTokens

SUFFIX = ".nexus.gguf"
OFF = "off"


def nexus_for(model: Model, choice: str | None, warn: Callable[[str], None]) -> NexusTokens | None:
    """The Nexus tokens to use with a model.

    Nexus tokens are trained for a model as it is. What they are worth beside LoRA adapters is not known, so that a file is used there only if it is
    named; what is found is left out.

    Args:
        choice: a Nexus file, OFF for none, or None for the first file that fits, of those beside the model, among the user's models and
            among those that come with kvlocal.
        warn: told why a file that was not named is not used, unless it is for another model, and that one is used beside adapters.

    Raises:
        KvlocalError: the named file cannot be used.
    """
    if choice == OFF:
        return None
    if choice is not None:
        named = NexusTokens(model, choice)
        if model.changed_by:
            warn(f"{choice} was trained for {model.path.name} without LoRA adapters: how well its tokens stand for turns with them is not known")
        return named
    for path in _candidates(model.path):
        try:
            if not model.changed_by:
                return NexusTokens(model, path)
            NexusFile.load(path).check_base(Container(model.path))
            warn(f"{path} was trained for {model.path.name} without LoRA adapters and is left out: to use it all the same, name it with --nexus")
            return None
        except WrongBase:
            continue
        except KvlocalError as error:
            warn(f"{error}; going on without Nexus tokens")
    return None


def _candidates(model: Path) -> Iterator[Path]:
    places = dict.fromkeys(place.resolve() for place in (model.parent, models_dir(), shipped_dir()))
    for place in places:
        if place.is_dir():
            yield from sorted(path for path in place.iterdir() if path.name.endswith(SUFFIX))
