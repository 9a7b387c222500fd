"""NexusTokens: a Nexus file loaded beside its model, and how its tokens get into a cache."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from kvlocal.gguf.container import Container
from kvlocal.llama.adapter import Adapter
from kvlocal.llama.model import Model
from kvlocal.nexus.file import NexusFile
from kvlocal.policies.segmentation import Dynamic

# where Nexus tokens come within a text of the user that is longer than a block
LONG_TEXT = Dynamic(min_block=256, max_block=512)


class NexusTokens:
    """The trained soft tokens of one model (SONIC, arXiv 2601.21927). Contexts that read them are to be made after it.

    model: the weights
    path: the Nexus file

    file: what it holds
    adapter: what they are computed with besides, None for nothing

    Raises:
        NexusError: the file cannot be used, or not with this model.
        EngineError: llama.cpp does not take its adapter.
    """

    def __init__(self, model: Model, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.file = NexusFile.load(path)
        base = Container(model.path)
        self.file.check_base(base)
        self.adapter = Adapter(model, path, base=base) if self.file.adapter else None

    def vectors(self, k: int) -> npt.NDArray[np.float32]:
        """The first k rows of the table, float32 [k, n_embd]."""
        return self.file.table[:k]
