"""Blocks of different lengths in one dense array of cells, so that all are scored and kept at once (DynSplit-KV, uniform mapping)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Fold = Literal["mean", "max"]

_ROWS = 4096  # blocks gathered at once, few enough for their values to stay in the processor's cache


@dataclass(frozen=True)
class UniformMap:
    """The blocks of all layers and heads, one row each, head after head and by age. P cells in the longest.

    index: int32 [n_block, P], the cells of each block as numbers into the flattened [L, H, C]; L * H * C, which is no cell, after its end
    lengths: int32 [n_block], cells of each block
    stays: bool [n_block], blocks of cells that stay in any case
    shape: L, H, C
    """

    index: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    stays: npt.NDArray[np.bool_]
    shape: tuple[int, int, int]

    @classmethod
    def from_blocks(cls, blocks: npt.NDArray[np.integer], stays: npt.NDArray[np.bool_]) -> UniformMap:
        """The map of the block numbers of cells, int [L, H, C], ascending along C; heads may hold different cells.

        stays: bool [L, H, C], cells that stay in any case; a block also ends where this changes, so the cells of one are all of a kind
        """
        if blocks[..., 0].size > 1 and (blocks == blocks[0, 0]).all() and (stays == stays[0, 0]).all():
            return cls.from_blocks(blocks[:1, :1], stays[:1, :1])._repeated(blocks.shape)
        begins = np.ones(blocks.shape, bool)
        np.not_equal(blocks[..., 1:], blocks[..., :-1], out=begins[..., 1:])
        begins[..., 1:] |= stays[..., 1:] != stays[..., :-1]
        starts = np.flatnonzero(begins).astype(np.int32)
        lengths = np.diff(starts, append=np.int32(blocks.size))
        inside = np.arange(lengths.max(), dtype=np.int32) < lengths[:, None]
        index = np.full(inside.shape, blocks.size, np.int32)
        index[inside] = np.arange(blocks.size, dtype=np.int32)
        return cls(index, lengths, stays.reshape(-1)[starts], blocks.shape)

    def _repeated(self, shape: tuple[int, int, int]) -> UniformMap:
        """The map of [L, H, C] whose heads all hold the same, from the map [1, 1, C] of one."""
        n_layer, n_head, n_cell = shape
        n, size = n_layer * n_head, n_layer * n_head * n_cell
        first = np.arange(0, size, n_cell, dtype=np.int32)
        index = first[:, None, None] + self.index
        index[:, self.index == n_cell] = size
        return UniformMap(index.reshape(-1, self.index.shape[1]), np.tile(self.lengths, n), np.tile(self.stays, n), shape)

    def scores(self, values: npt.NDArray[np.float32], fold: Fold) -> npt.NDArray[np.float32]:
        """The mean or the largest of the values [L, H, C] of each block's cells, float32 [n_block]."""
        reduce, padding = (np.maximum.reduce, -np.inf) if fold == "max" else (np.add.reduce, 0)
        padded = np.append(values, np.float32(padding))
        scores = np.empty(len(self.index), np.float32)
        for start in range(0, len(scores), _ROWS):
            rows = slice(start, start + _ROWS)
            # cells first: reducing a long axis is what numpy does fast
            reduce(padded.take(self.index[rows].T), axis=0, out=scores[rows])
        return scores if fold == "max" else np.divide(scores, self.lengths, dtype=np.float32)

    def keep(self, scores: npt.NDArray[np.float32], values: npt.NDArray[np.float32], budget: int) -> npt.NDArray[np.intp]:
        """The cells of the best blocks, `budget` of each layer and head, ascending: [L, H, budget].

        Blocks that stay come first, then whole blocks by score [n_block], of equals the newer one, until one does not fit; of that one the
        cells of the highest values [L, H, C] fill the budget.

        budget: at least the number of cells that stay, at most C
        """
        n_layer, n_head, n_cell = self.shape
        head = self.index[:, 0] // n_cell
        counts = np.bincount(head, minlength=n_layer * n_head)
        first = np.cumsum(counts) - counts
        nth = np.arange(len(head)) - first[head]

        # [heads, most blocks in one], empty blocks at the end
        rank = np.full((len(counts), counts.max()), -np.inf, np.float32)
        rank[head, nth] = np.where(self.stays, np.inf, scores)
        length = np.zeros(rank.shape, np.int32)
        length[head, nth] = self.lengths
        order = np.argsort(rank, axis=1, kind="stable")[:, ::-1]
        filled = np.cumsum(np.take_along_axis(length, order, axis=1), axis=1)
        n_whole = (filled <= budget).sum(axis=1)
        whole = np.zeros(rank.shape, bool)
        np.put_along_axis(whole, order, np.arange(rank.shape[1]) < n_whole[:, None], axis=1)
        kept = np.repeat(whole[head, nth], self.lengths)

        # the block that comes next, of which some cells stay
        rows = np.flatnonzero(n_whole < rank.shape[1])
        left = budget - np.where(n_whole[rows] > 0, filled[rows, n_whole[rows] - 1], 0)
        cells = self.index[first[rows] + order[rows, n_whole[rows]]]
        worth = np.where(cells < values.size, values.take(cells, mode="clip"), -np.inf)
        best = np.argsort(worth, axis=1, kind="stable")[:, ::-1]
        kept[np.take_along_axis(cells, best, axis=1)[np.arange(cells.shape[1]) < left[:, None]]] = True

        cells = np.flatnonzero(kept).reshape(n_layer, n_head, budget)
        cells -= np.arange(0, kept.size, n_cell).reshape(n_layer, n_head, 1)
        return cells
