"""LlamaState: a conversation to come back to."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from kvlocal.compat.errors import NotSupported
from kvlocal.serving.conversation import Checkpoint
from kvlocal.serving.request import Finished, Usage


@dataclass(frozen=True)
class LlamaState:
    """A conversation as it was, in the memory of its process.

    llama: whose it is
    last: the answer that it ends with, None if there was none
    checkpoint: what is needed to go on from it
    seed: of the Llama
    """

    llama: weakref.ref[Any]
    last: Finished | None
    checkpoint: Checkpoint | None
    seed: int | None

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation."""
        used = self.last.usage if self.last else Usage()
        return used.prompt_tokens + used.completion_tokens

    def __reduce__(self) -> Any:
        raise NotSupported("a state belongs to its process: keep the messages of the conversation instead")
