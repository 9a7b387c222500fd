"""Boxes of an archive's keys: by them the few blocks are found that the last queries can find something in."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvlocal.cache.archive import CHUNK, Archive
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.layout import BLOCK


class KeyBoxes:
    """The least and the largest number in each channel of the keys of each block, as Quest and ArkVale have them.

    They take an eighth of what the keys take as f16, whatever the archive's types are, from the memory of the archive and then from its disk.

    native: the cache whose keys they are
    """

    def __init__(self, native: NativeCache) -> None:
        self._native = native
        self._chunks: list[npt.NDArray[np.float16]] = []
        self._n_blocks = 0

    def cut(self, n_tokens: int) -> None:
        """Forgets the boxes of blocks that do not end in the first n_tokens."""
        self._n_blocks = min(self._n_blocks, n_tokens // BLOCK)

    def of(self, archive: Archive) -> list[npt.NDArray[np.float16]]:
        """For each of its chunks [L, H, 2, head size, CHUNK / BLOCK], filled for all blocks that are whole (NativeCache.fill_boxes).

        Raises:
            ArchiveFailed: there is no room for them.
        """
        keys, per_chunk = archive.key_chunks(), CHUNK // BLOCK
        layout = self._native.layout()
        shape = layout.n_layer, layout.n_head_kv, 2, layout.n_embd_head_k, per_chunk
        while len(self._chunks) < len(keys):
            self._chunks.append(archive.beside(2 * math.prod(shape)).view(np.float16).reshape(shape))
        end = archive.n_tokens // BLOCK
        while self._n_blocks < end:
            chunk, at = divmod(self._n_blocks, per_chunk)
            n = min(per_chunk - at, end - self._n_blocks)
            self._native.fill_boxes(keys[chunk], range(at, at + n), self._chunks[chunk], archive.types)
            self._n_blocks += n
        return self._chunks[: len(keys)]
