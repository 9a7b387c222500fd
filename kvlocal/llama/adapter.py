"""Lora and Adapter: LoRA adapters, as they are asked for and as they are loaded beside their model."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from kvlocal.files.fingerprint import fingerprint
from kvlocal.gguf.container import Container, ContainerError
from kvlocal.gguf.lora import flaw_of_adapter, flaw_of_values
from kvlocal.llama.errors import EngineError
from kvlocal.llama.library import load
from kvlocal.llama.log import NativeLog

# of a Nexus file (kvlocal.nexus.file), which llama.cpp would take for an adapter like others
_NEXUS = "kvlocal.nexus.version"


class HasWeights(Protocol):
    """The model that an adapter is for."""

    path: Path

    @property
    def pointer(self) -> int: ...


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter that a model is to be used with: its weights W become W + scale * alpha / r * B A.

    path: a GGUF file, as llama.cpp's converter writes it
    scale: 0 is as without it

    Raises:
        EngineError: the scale is no number, or none that a float32 holds.
    """

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not isinstance(self.scale, (int, float)) or not abs(self.scale) <= float(np.finfo(np.float32).max):
            raise EngineError(f"{self.scale!r} is no scale for {self.path}: give a number, such as 0.5")

    @classmethod
    def parse(cls, text: str) -> Self:
        """FILE or FILE:SCALE. What is a file by all of its name is that file.

        Raises:
            EngineError: there is no such file, or what follows it is no number.
        """
        name, colon, scale = text.rpartition(":")
        if os.path.exists(text) or not (colon and os.path.exists(name)):
            return cls(_existing(Path(text)))
        try:
            return cls(_existing(Path(name)), float(scale))
        except ValueError:
            raise EngineError(f"{scale!r} is no scale for {name}: give a number, as in {name}:0.5") from None


def checked_base(model: Path, loras: Sequence[Lora]) -> Container | None:
    """A model's file, opened, if the model can be used with these adapters; None without any.

    Raises:
        EngineError: it cannot.
        ContainerError: the model's file cannot be read.
    """
    if not loras:
        return None
    base = Container(model)
    for lora in loras:
        check_lora(lora, base)
    return base


def check_lora(lora: Lora, base: Container) -> None:
    """Whether a model can be used with an adapter, by the files of both.

    Raises:
        EngineError: it cannot.
    """
    container = _checked(lora.path, base)
    if _NEXUS in container.kinds:
        raise EngineError(f"{lora.path} is a Nexus file, whose adapter is for Nexus tokens alone: give it with --nexus")
    if flaw := flaw_of_values(container):
        raise _misfit(lora.path, base, flaw)


class Adapter:
    """A LoRA adapter of a model, from a GGUF file; it lives as long as the model. Contexts that use it are to be made after it.

    model: the model
    path, scale: as Lora has them
    base: the model's file, where it is open already

    fingerprint: of the adapter's file as it was loaded

    Raises:
        EngineError: no such file, or not an adapter for this model.
    """

    def __init__(self, model: HasWeights, path: str | os.PathLike[str], scale: float = 1.0, *, base: Container | None = None) -> None:
        self.path, self.scale = Path(path), float(scale)
        base = base or Container(model.path)
        _checked(self.path, base)
        lib = load().llama_cpp
        with NativeLog(lib) as log:
            self.fingerprint = fingerprint(self.path)
            self.pointer = lib.llama_adapter_lora_init(model.pointer, os.fsencode(self.path))
        if not self.pointer:
            raise EngineError(f"{self.path} is no adapter for {base.path.name}{log.reason}: name another file")

    def __str__(self) -> str:
        """As Lora.parse takes it."""
        return f"{self.path}:{self.scale:g}"


def use_adapters(context: int, adapters: Sequence[Adapter]) -> None:
    """What a llama_context of this address decodes from now on is computed with these adapters on top of the weights, in this order.

    Raises:
        EngineError: llama.cpp refused them.
    """
    lib, n = load().llama_cpp, len(adapters)
    pointers = (lib.llama_adapter_lora_p_ctypes * n)(*(adapter.pointer for adapter in adapters))
    if lib.llama_set_adapters_lora(context, pointers, n, (ctypes.c_float * n)(*(adapter.scale for adapter in adapters))):
        raise EngineError(f"{' and '.join(str(adapter.path) for adapter in adapters)} cannot be used with this model: name other files")


def _existing(path: Path) -> Path:
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}): name a LoRA adapter in GGUF format") from error


def _checked(path: Path, base: Container) -> Container:
    try:
        container = Container(path)
    except ContainerError as error:
        raise EngineError(str(error)) from error
    if flaw := flaw_of_adapter(container, base):
        raise _misfit(path, base, flaw)
    return container


def _misfit(path: Path, base: Container, flaw: str) -> EngineError:
    return EngineError(f"{path} cannot be used with {base.path.name} ({flaw}): name an adapter that was made for this model")
