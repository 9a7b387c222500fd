"""Lets a policy choose the cells while a text is read in PyTorch, from the queries and keys of that very reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlocal.errors import KvlocalError
from kvlocal.policies import CacheState, Policy
from kvlocal.training.compressed_reading import Held, RecordedCells, Span, SpanRead
from kvlocal.training.compression_times import Timetable

SOURCES = frozenset({"scores", "redundancy", "sums", "values"})

_SIMILAR = 0.5  # keys with a larger cosine are twins (R-KV)
_SMALLEST_NORM = 1e-8


class PolicyChoice:
    """The cells that a policy leaves, as kvlocal.cache.compression carries its plans out.

    Gradients stop here: cells are chosen from values alone. One choice is for one reading, in which each layer is compressed by itself.

    policy: one whose `needs` are all in SOURCES
    timetable: when it is asked, and how many cells stay
    n_pinned: the first tokens of the text, which always stay
    window: the last cells, which always stay, and whose queries score the others

    Raises KvlocalError if the policy needs something that a reading does not have.
    """

    def __init__(self, policy: Policy, timetable: Timetable, n_pinned: int, window: int) -> None:
        unknown = policy.needs - SOURCES
        if unknown:
            needs = ", ".join(sorted(unknown))
            raise KvlocalError(f"a policy that needs {needs} cannot choose in training: choose one without, such as gkv or snapkv")
        self._policy, self._timetable, self._n_pinned, self._window = policy, timetable, n_pinned, window
        # of the layer that is read: what its cells carry on
        self._carried: dict[str, npt.NDArray[np.float32]] = {}
        self._chosen: dict[tuple[int, int], Held] = {}

    @property
    def spans(self) -> Sequence[Span]:
        return self._timetable.spans

    @torch.no_grad()
    def held(self, layer: int, span: int, before: SpanRead) -> Held:
        n_cells = before.held.tokens.shape[1]
        if span == 1:
            self._carried = {}
        n_new = self.spans[span - 1].end - self.spans[span - 1].begin
        names = ["history", *({"sums"} & self._policy.needs)]
        carried = {name: self._with_new(self._carried.get(name), before.held.tokens.shape, n_new) for name in names}
        if "sums" in carried:
            carried["sums"] = np.nan_to_num(carried["sums"]) + n_new * _numpy(attention_of_last(before, n_new))
        plan = self._policy.plan(self._state(before, carried, n_new), self._timetable.n_keep[span])
        taken = self._taken(layer, span, before, plan.keep)
        keep = torch.from_numpy(taken[0].astype(np.int64)).to(before.held.tokens.device)
        carried["history"] = np.full((1, *before.held.tokens.shape), np.nan, np.float32) if plan.history is None else plan.history
        self._carried = {name: np.take_along_axis(values, taken, axis=-1) for name, values in carried.items()}
        tokens, positions = (part.gather(1, keep) for part in (before.held.tokens, before.held.positions))
        first = self._timetable.first[span]
        if first is not None:
            positions = torch.arange(first, first + keep.shape[1], device=positions.device).expand_as(positions)
        assert keep.shape[1] < n_cells
        self._chosen[layer, span] = Held(tokens, positions)
        return self._chosen[layer, span]

    def _taken(self, layer: int, span: int, before: SpanRead, keep: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """The cells that stay, int [1, H_kv, n], of those that the policy's plan keeps: all. Who compares it with an engine takes the engine's."""
        return keep

    def _state(self, before: SpanRead, carried: dict[str, npt.NDArray[np.float32]], n_new: int) -> CacheState:
        needs = self._policy.needs
        arrays: dict[str, Any] = {}
        if "scores" in needs:
            # rotating forgets the queries of earlier spans
            n_query = min(self._window, n_new) if self._policy.rotates else min(self._window, before.queries.shape[2])
            arrays["scores"] = _numpy(attention_of_last(before, n_query))
        if "redundancy" in needs:
            arrays["redundancy"] = _numpy(redundancy(before.cells.keys))
        if "values" in needs:
            arrays["values"] = _numpy(before.cells.values.float().norm(dim=-1))
        if "sums" in needs:
            arrays["sums"] = carried["sums"]
        pinned = (before.held.tokens < self._n_pinned).cpu().numpy()[None]
        return CacheState(pinned, carried["history"], self._window, **arrays)

    @staticmethod
    def _with_new(values: npt.NDArray[np.float32] | None, shape: Sequence[int], n_new: int) -> npt.NDArray[np.float32]:
        """What the cells carry, [1, H, C]: nothing (NaN) the n_new last."""
        found = np.full((1, *shape), np.nan, np.float32)
        if values is not None:
            found[..., : shape[-1] - n_new] = values
        return found

    def recorded(self) -> RecordedCells:
        """What was chosen, once a text is read."""
        n_layer = 1 + max(layer for layer, _ in self._chosen) if self._chosen else 1
        held = [[self._chosen[layer, span] for layer in range(n_layer)] for span in range(1, len(self.spans))]
        shape = (n_layer, held[0][0].tokens.shape[0] if held else 1, 0)
        empty = torch.zeros(shape, dtype=torch.int64)
        return RecordedCells(
            self.spans,
            [empty, *(torch.stack([one.tokens for one in layers]) for layers in held)],
            [empty, *(torch.stack([one.positions for one in layers]) for layers in held)],
        )


def attention_of_last(read: SpanRead, n: int) -> Tensor:
    """What the last n tokens paid to each cell: softmax weights, maximum over a group's heads, mean over the tokens; float32 [H_kv, C]."""
    queries, keys = read.queries[:, :, -n:].float(), read.cells.keys.float()
    scores = queries @ keys[:, None].transpose(-1, -2) * read.scale
    # the last n cells are theirs
    unseen = torch.ones(n, keys.shape[1], dtype=torch.bool, device=keys.device).triu_(keys.shape[1] - n + 1)
    return scores.masked_fill_(unseen, float("-inf")).softmax(-1).amax(1).mean(1)


def redundancy(keys: Tensor) -> Tensor:
    """How much each key [H_kv, C, d] repeats others of its head (R-KV, arXiv 2505.24133), a softmax over cells, float32 [H_kv, C].

    The similarity of each key to the others, but the newest that is similar to it, mean over all that are compared with it.
    """
    unit = F.normalize(keys.float(), dim=-1, eps=_SMALLEST_NORM)
    similarity = unit @ unit.transpose(-1, -2)
    similarity.diagonal(dim1=-2, dim2=-1).zero_()
    order = torch.arange(1, keys.shape[1] + 1, device=keys.device)
    twin = ((similarity > _SIMILAR) * order).argmax(-1, keepdim=True)
    found = similarity.gather(-1, twin)
    similarity.scatter_(-1, twin, found.masked_fill(found > _SIMILAR, 0))
    return similarity.mean(-2).softmax(-1)


def _numpy(values: Tensor) -> npt.NDArray[np.float32]:
    """[H, C] as policies have it, [1, H, C]."""
    return values.cpu().numpy()[None]
