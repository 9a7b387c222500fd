"""What is trained: the embedding table and the adapter, as PyTorch tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvlocal.nexus.file import NexusFile
from kvlocal.training.decoder import LowRankAdapter
from kvlocal.training.weights import LINEAR, Weights

_N_SAMPLED = 4096  # token embeddings that the table's first values are drawn after


@dataclass(frozen=True)
class Parameters:
    """Leaves of the computation, all float32 with gradients.

    table: [K, n_embd]
    pairs: by GGUF's tensor name, A [r, n_in] and B [n_out, r]; empty without an adapter
    alpha: B A is weighted with alpha / r
    """

    table: Tensor
    pairs: dict[str, tuple[Tensor, Tensor]]
    alpha: float

    @classmethod
    def new(cls, weights: Weights, k: int, rank: int, seed: int) -> Parameters:
        """A table that looks like token embeddings, and an adapter that adds nothing yet; rank 0 is no adapter.

        The table is normal with the mean and the standard deviation, of each number, of 4,096 random token embeddings as the first layer
        gets them. A is uniform within 1 / sqrt(n_in), B is zero (LoRA, arXiv 2106.09685), alpha is the rank.
        """
        hyper, device = weights.hyper, weights.embedding.device
        rng = np.random.default_rng([seed, 0])
        chosen = torch.from_numpy(rng.integers(0, hyper.n_vocab, _N_SAMPLED)).to(device)
        sample = (weights.embedding[chosen].float() * hyper.embedding_scale).cpu().numpy()
        table = sample.mean(0) + sample.std(0) * rng.standard_normal((k, hyper.n_embd))
        pairs = {}
        for i, layer in enumerate(weights.layers if rank else ()):
            for name in LINEAR:
                n_out, n_in = layer[name + ".weight"].shape
                a = rng.uniform(-1, 1, (rank, n_in)) / math.sqrt(n_in)
                pairs[f"blk.{i}.{name}.weight"] = _leaf(a, device), _leaf(np.zeros((n_out, rank)), device)
        return cls(_leaf(table, device), pairs, float(rank))

    @classmethod
    def of(cls, file: NexusFile, device: torch.device) -> Parameters:
        """What a Nexus file holds."""
        pairs = {name: (_leaf(a, device), _leaf(b, device)) for name, (a, b) in file.adapter.items()}
        return cls(_leaf(file.table, device), pairs, file.alpha)

    @property
    def adapter_leaves(self) -> list[Tensor]:
        return [half for pair in self.pairs.values() for half in pair]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.table, *self.adapter_leaves]

    def adapter(self, dtype: torch.dtype, rows: Tensor) -> LowRankAdapter | None:
        """The adapter in the compute type, for these rows, int64 [n]."""
        if not self.pairs:
            return None
        pairs = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in self.pairs.items()}
        rank = len(next(iter(self.pairs.values()))[0])
        return LowRankAdapter(pairs, self.alpha / rank, rows)


def _leaf(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device).requires_grad_()
