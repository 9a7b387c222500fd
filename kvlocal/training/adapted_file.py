"""AdaptedFile: an adapter that was trained for a compressed cache, in a GGUF file that is a LoRA adapter like others."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy.typing as npt

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import replacing
from kvlocal.gguf.container import Container, ContainerError
from kvlocal.gguf.lora import ALPHA, HALF_A, HALF_B, changed_tensors, flaw_of_adapter, flaw_of_values
from kvlocal.gguf.lora_writer import write_lora
from kvlocal.nexus.base import base_hash

VERSION = 1

_PREFIX = "kvlocal.adapt."


class AdaptedFileError(KvlocalError):
    """A file holds no adapter that was trained here, or one for another model."""


@dataclass(frozen=True)
class AdaptedFile:
    """What training gives.

    adapter: by name of the base model's tensor [n_out, n_in], the pair A [r, n_in] and B [n_out, r], float16 or float32
    alpha: B A is weighted with alpha / r
    architecture, base_name, base_hash: of the base model; kvlocal.nexus.base says what the hash covers
    method: how it was trained, "distill" or "rl"
    policies: that it was trained with
    ratios: compression ratios that it was trained with; 0 is no compression
    record: the training and what came of it, anything that JSON can hold
    """

    adapter: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
    alpha: float
    architecture: str
    base_name: str
    base_hash: str
    method: str
    policies: tuple[str, ...]
    ratios: tuple[float, ...]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """r of the adapter."""
        return next((len(a) for a, _ in self.adapter.values()), 0)

    @property
    def n_parameters(self) -> int:
        return sum(half.size for pair in self.adapter.values() for half in pair)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, or leaves what was there as it was.

        Raises:
            KvlocalError: it cannot be written.
        """
        metadata = {
            _PREFIX + "version": VERSION,
            **{_PREFIX + name: getattr(self, name) for name in _TEXTS},
            _PREFIX + "policies": ",".join(self.policies),
            _PREFIX + "ratios": self.ratios,
            _PREFIX + "record": json.dumps(self.record),
        }
        with replacing(path) as staged:
            write_lora(staged, self.architecture, self.alpha, self.adapter, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], base: Container | None = None) -> Self:
        """Reads a file, and with a model checks that it was made for it and that the engine would take it.

        Raises:
            AdaptedFileError: no such file, or one that `kvlocal adapt` did not write, or it is for another model.
        """
        path = Path(path)
        try:
            container = Container(path)
        except ContainerError as error:
            raise AdaptedFileError(str(error)) from error
        metadata = container.metadata
        if metadata.get("general.type") != "adapter" or _PREFIX + "version" not in metadata:
            raise AdaptedFileError(f"{path} was not written by `kvlocal adapt`: name a file that was")
        if (version := metadata[_PREFIX + "version"]) != VERSION:
            raise AdaptedFileError(f"{path} has version {version} of the format and this kvlocal reads {VERSION}: update kvlocal")
        try:
            found = cls._from(container)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise AdaptedFileError(f"{path} lacks a part or holds one of the wrong kind: train or fetch it again") from None
        if base:
            if flaw := flaw_of_adapter(container, base) or flaw_of_values(container):
                raise AdaptedFileError(f"{path} cannot be used with {base.path.name} ({flaw}): name a file that was trained for this model")
            if base_hash(base) != found.base_hash:
                raise AdaptedFileError(f"{path} was trained for {found.base_name}, not for {base.path.name}: train one for it or use that model")
        return found

    @classmethod
    def _from(cls, container: Container) -> Self:
        metadata, tensors = container.metadata, container.tensors
        pairs = {name: (tensors[name + HALF_A].values(), tensors[name + HALF_B].values()) for name in changed_tensors(container)}
        record = json.loads(metadata[_PREFIX + "record"])
        if not isinstance(record, dict):
            raise TypeError("record")
        return cls(
            adapter=pairs,
            alpha=float(metadata[ALPHA]),
            architecture=metadata["general.architecture"],
            policies=tuple(metadata[_PREFIX + "policies"].split(",")),
            ratios=tuple(round(ratio, 6) for ratio in metadata[_PREFIX + "ratios"].tolist()),
            record=record,
            **{name: metadata[_PREFIX + name] for name in _TEXTS},
        )


_TEXTS = ("base_name", "base_hash", "method")


def is_adapted_file(path: Path) -> bool:
    """Whether `AdaptedFile.load` takes a file."""
    try:
        AdaptedFile.load(path)
    except KvlocalError:
        return False
    return True
