"""Files of hub repositories: how they are named, where they lie on disk, and which of them has a quantization."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote

from kvlocal.errors import KvlocalError
from kvlocal.files.parts import parts_of
from kvlocal.files.places import models_dir

GGUF_MAGIC = b"GGUF"
MAX_LISTED = 20  # files that an error names

_FILE = re.compile(r"hf:([\w.-]+)/([\w.-]+)/([^@]+\.gguf)(?:@(.+))?", re.IGNORECASE)
_QUANTIZED = re.compile(r"hf:([\w.-]+)/([\w.-]+):([\w.-]+)(?:@(.+))?", re.IGNORECASE)
_PROJECTOR = "mmproj"  # in the names of files with what turns images into embeddings, which is no model


@dataclass(frozen=True)
class _InRepository:
    """What is in a hub repository."""

    owner: str
    repo: str

    @property
    def repository(self) -> str:
        return f"{self.owner}/{self.repo}"


@dataclass(frozen=True)
class HubFile(_InRepository):
    """A GGUF file of a hub repository, written `hf:owner/repo/path/file.gguf[@revision]`; the first part stands for a model in several."""

    file: str  # path inside the repository
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read the `hf:` form.

        Raises:
            KvlocalError: `name` is not of that form.
        """
        match = _FILE.fullmatch(name)
        # Empty and dotted segments would let a name point outside the models directory.
        if match is None or any(part in ("", ".", "..") for part in "/".join(match.group(1, 2, 3)).split("/")):
            raise KvlocalError(
                f"{name!r} does not name a GGUF file of a hub repository: write hf:owner/repo/file.gguf[@revision], or hf:owner/repo:Q4_K_M "
                "for the file with this quantization"
            )
        owner, repo, file, revision = match.groups()
        return cls(owner, repo, parts_of(file)[0], revision)

    @classmethod
    def pulled(cls) -> Iterator[Self]:
        """Every hub file in the models directory, by path; of a model in several parts the first."""
        root = models_dir() / "hf"
        for path in sorted(root.glob("*/*/**/*")):
            if path.suffix.lower() != ".gguf" or not path.is_file():
                continue
            owner, repo, *rest = path.relative_to(root).parts
            revision = unquote(rest.pop(0)[1:]) if rest[0].startswith("@") else None
            file = "/".join(rest)
            if file == parts_of(file)[0]:
                yield cls(owner, repo, file, revision)

    @property
    def name(self) -> str:
        """The `hf:` form that `parse` reads."""
        return f"hf:{self.repository}/{self.file}{_at(self.revision)}"

    @property
    def path(self) -> Path:
        """Where the file is, or would be; another revision is another file."""
        return self._folder / self.file

    @property
    def parts(self) -> list[str]:
        """The paths inside the repository of all files that the model consists of, in order."""
        return parts_of(self.file)

    @property
    def paths(self) -> list[Path]:
        """Where these are, or would be."""
        return [self._folder / part for part in self.parts]

    @property
    def _folder(self) -> Path:
        folder = models_dir() / "hf" / self.owner / self.repo
        return folder / ("@" + quote(self.revision, safe="")) if self.revision else folder

    @property
    def present(self) -> bool:
        """Whether all its files are there and start as a GGUF file does."""
        return all(map(is_gguf, self.paths))


@dataclass(frozen=True)
class HubQuantization(_InRepository):
    """The GGUF file of a hub repository with a quantization, written `hf:owner/repo:Q4_K_M[@revision]`; which file that is its list says."""

    quantization: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Read the `hf:` form; None if `name` is not of that form."""
        match = _QUANTIZED.fullmatch(name)
        if match is None or any(part in (".", "..") for part in match.group(1, 2)):
            return None
        return cls(*match.groups())

    @property
    def name(self) -> str:
        """The `hf:` form that `parse` reads."""
        return f"hf:{self.repository}:{self.quantization}{_at(self.revision)}"

    def pulled(self) -> HubFile | None:
        """The file, if it is in the models directory; of several that fit the first."""
        paths = [found.file for found in HubFile.pulled() if (found.owner, found.repo, found.revision) == (self.owner, self.repo, self.revision)]
        fitting = self._fitting(sorted(paths))
        return HubFile(self.owner, self.repo, fitting[0], self.revision) if fitting else None

    def among(self, paths: Iterable[str]) -> str:
        """The file with this quantization among paths of GGUF files inside the repository; of a model in several parts the first.

        Raises:
            KvlocalError: there is none, or there are several.
        """
        paths = models_among(paths)
        fitting = self._fitting(paths)
        if len(fitting) != 1:
            listed = ", ".join(sorted(fitting or paths)[:MAX_LISTED]) or "it has no GGUF file"
            count = f"{len(fitting)} files" if fitting else "no file"
            raise KvlocalError(
                f"{self.repository} has {count} with the quantization {self.quantization}: name a file as hf:{self.repository}/file.gguf ({listed})"
            )
        return fitting[0]

    def _fitting(self, paths: Iterable[str]) -> list[str]:
        # a word of the file's name or of a folder's: Q4_K is not part of Q4_K_M, and F16 not of BF16
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(self.quantization)}(?![A-Za-z0-9_])", re.IGNORECASE)
        return [path for path in paths if word.search(path)]


def _at(revision: str | None) -> str:
    """How a revision stands behind a name."""
    return f"@{revision}" if revision else ""


def models_among(paths: Iterable[str]) -> list[str]:
    """Of the paths inside a repository those of models: GGUF files but no projectors of images, each model once, and all of its parts there."""
    of_models = {path for path in paths if path.lower().endswith(".gguf") and _PROJECTOR not in path.rpartition("/")[2].lower()}
    return sorted(path for path in of_models if path == parts_of(path)[0] and of_models.issuperset(parts_of(path)))


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
