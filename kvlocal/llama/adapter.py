"""Adapter: a LoRA adapter beside its model."""

import os
from pathlib import Path

from kvlocal.llama.errors import EngineError
from kvlocal.llama.library import load
from kvlocal.llama.log import NativeLog
from kvlocal.llama.model import Model, check_is_gguf


class Adapter:
    """A LoRA adapter of a model, from a GGUF file; it lives as long as the model. Contexts that use it are to be made after it.

    Raises:
        EngineError: no such file, or not an adapter for this model.
    """

    def __init__(self, model: Model, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        check_is_gguf(self.path)
        lib = load().llama_cpp
        with NativeLog(lib) as log:
            self.pointer = lib.llama_adapter_lora_init(model.pointer, os.fsencode(self.path))
        if not self.pointer:
            raise EngineError(f"{self.path} is no adapter for {model.path}{log.reason}: name another file")
