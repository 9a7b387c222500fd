"""NexusFile: a trained embedding table and its adapter in one GGUF file, which llama.cpp takes as a LoRA adapter."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import replacing
from kvlocal.gguf.container import Container, ContainerError
from kvlocal.gguf.lora import ALPHA, HALF_A, HALF_B
from kvlocal.gguf.lora_writer import write_lora
from kvlocal.nexus.base import base_hash

VERSION = 1
TURN_RULE = "turn"  # a segment is a user's turn and the answer to it, up to the markup that closes the answer

_PREFIX = "kvlocal.nexus."


class NexusError(KvlocalError):
    """A Nexus file cannot be used, or not with this model."""


class WrongBase(NexusError):
    """A Nexus file was made for another model."""


@dataclass(frozen=True)
class NexusFile:
    """What training gives.

    table: float32 [K, n_embd]; a segment gets the first k rows
    adapter: by name of the base model's tensor [n_out, n_in], the pair A [r, n_in] and B [n_out, r], float16 or float32; may be empty
    alpha: B A is weighted with alpha / r
    architecture, base_name, base_hash: of the base model; kvlocal.nexus.base says what the hash covers
    ratios: compression ratios it was trained for
    segment_rule: what a segment is, TURN_RULE
    record: how it was trained and what came of it, anything that JSON can hold
    """

    table: npt.NDArray[np.float32]
    adapter: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
    alpha: float
    architecture: str
    base_name: str
    base_hash: str
    ratios: tuple[float, ...]
    segment_rule: str = TURN_RULE
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """Rows of the table, K."""
        return len(self.table)

    @property
    def n_embd(self) -> int:
        return self.table.shape[1]

    @property
    def rank(self) -> int:
        """r of the adapter; 0 without one."""
        return next((len(a) for a, _ in self.adapter.values()), 0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, or leaves what was there as it was.

        Raises:
            NexusError: the contents are not what `load` takes.
            KvlocalError: it cannot be written.
        """
        self._check(Path(path))
        with replacing(path) as staged:
            self._write(staged)

    def _write(self, path: Path) -> None:
        metadata = {
            _PREFIX + "version": VERSION,
            _PREFIX + "k": self.k,
            _PREFIX + "n_embd": self.n_embd,
            **{_PREFIX + name: getattr(self, name) for name in ("base_name", "base_hash", "segment_rule")},
            _PREFIX + "ratios": self.ratios,
            _PREFIX + "record": json.dumps(self.record),
            _PREFIX + "table": self.table.ravel().tolist(),
        }
        write_lora(path, self.architecture, self.alpha, self.adapter, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file and checks that it is whole and means something; `check_base` says whether it fits a model.

        Raises:
            NexusError: no such file, not a Nexus file, cut off, of another version, with wrong shapes or with values that are not finite.
        """
        path = Path(path)
        try:
            container = Container(path)
        except ContainerError as error:
            raise NexusError(str(error)) from error
        metadata = container.metadata
        if metadata.get("general.type") != "adapter" or _PREFIX + "version" not in metadata:
            raise NexusError(f"{path} is not a Nexus file: name one that `kvlocal nexus train` wrote")
        if metadata[_PREFIX + "version"] != VERSION:
            raise NexusError(f"{path} has version {metadata[_PREFIX + 'version']} of the format and this kvlocal reads {VERSION}: update kvlocal")
        try:
            found = cls._from(container)
        except (KeyError, TypeError, ValueError):
            raise NexusError(f"{path} lacks a part or holds one of the wrong kind: train or fetch it again") from None
        found._check(path)
        return found

    @classmethod
    def _from(cls, container: Container) -> Self:
        metadata = container.metadata
        table = np.asarray(metadata[_PREFIX + "table"], np.float32)
        names = [name.removesuffix(HALF_A) for name in container.tensors if name.endswith(HALF_A)]
        if set(container.tensors) != {name + end for name in names for end in (HALF_A, HALF_B)}:
            raise ValueError("a tensor without its partner")
        halves = {name: tensor.values().astype(_ADAPTER_TYPES[tensor.kind.name]) for name, tensor in container.tensors.items()}
        record = json.loads(metadata[_PREFIX + "record"])
        if not isinstance(record, dict):
            raise TypeError("record")
        return cls(
            table=table.reshape(metadata[_PREFIX + "k"], metadata[_PREFIX + "n_embd"]),
            adapter={name: (halves[name + HALF_A], halves[name + HALF_B]) for name in names},
            alpha=float(metadata[ALPHA]),
            ratios=tuple(round(ratio, 6) for ratio in metadata[_PREFIX + "ratios"].tolist()),
            record=record,
            **{name: _text(metadata[key]) for name, key in _TEXTS.items()},
        )

    def _check(self, path: Path) -> None:
        if self.table.ndim != 2 or 0 in self.table.shape:
            raise NexusError(f"{path} has an embedding table of the shape {list(self.table.shape)}: train or fetch it again")
        for name, (a, b) in self.adapter.items():
            if a.ndim != 2 or b.ndim != 2 or not 0 < len(a) == b.shape[1] == self.rank:
                raise NexusError(f"{path} has an adapter for {name} of the shapes {list(a.shape)} and {list(b.shape)}: train or fetch it again")
        arrays = {"the embedding table": self.table} | {f"the adapter for {name}": half for name, pair in self.adapter.items() for half in pair}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise NexusError(f"{path} holds values that are not finite in {name}: train or fetch it again")
        if not np.isfinite(self.alpha):
            raise NexusError(f"{path} weights its adapter with {self.alpha}: train or fetch it again")
        if self.segment_rule != TURN_RULE:
            raise NexusError(f"{path} was trained for segments of the kind {self.segment_rule!r}, which this kvlocal does not make: update kvlocal")

    def check_base(self, base: Container) -> None:
        """Whether the file was made for this model.

        Raises:
            WrongBase: it was made for another one.
            NexusError: it says that it was made for this one, and its parts do not fit.
        """
        # what is different is nearly always seen without reading the weights
        if base.metadata.get(f"{self.architecture}.embedding_length") != self.n_embd or base_hash(base) != self.base_hash:
            raise WrongBase(f"the Nexus file was trained for {self.base_name}, not for {base.path.name}: train one for it or use that model")
        for name, (a, b) in self.adapter.items():
            shape = base.tensors[name].shape if name in base.tensors else ()
            if shape != (len(b), a.shape[1]):
                raise NexusError(f"the Nexus file's adapter for {name} does not fit {base.path.name}: train or fetch it again")


def is_nexus_file(path: Path) -> bool:
    """Whether `NexusFile.load` takes a file."""
    try:
        NexusFile.load(path)
    except KvlocalError:
        return False
    return True


_ADAPTER_TYPES = {"F16": np.float16, "F32": np.float32}
_TEXTS = {"architecture": "general.architecture"} | {name: _PREFIX + name for name in ("base_name", "base_hash", "segment_rule")}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
