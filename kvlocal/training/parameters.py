"""What is trained: an adapter, and for Nexus tokens the embedding table beside it, as PyTorch tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvlocal.nexus.file import NexusFile
from kvlocal.training.adapted_file import AdaptedFile
from kvlocal.training.checkpoint import TrainingError
from kvlocal.training.decoder import LowRankAdapter
from kvlocal.training.weights import LINEAR, Weights

_N_SAMPLED = 4096  # token embeddings that the table's first values are drawn after


@dataclass(frozen=True)
class AdapterParameters:
    """An adapter as leaves of the computation, all float32 with gradients.

    pairs: by GGUF's tensor name, A [r, n_in] and B [n_out, r]; empty without an adapter
    alpha: B A is weighted with alpha / r
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    alpha: float

    @classmethod
    def begin(cls, weights: Weights, rank: int, seed: int) -> AdapterParameters:
        """An adapter that adds nothing yet: A is uniform within 1 / sqrt(n_in), B is zero (LoRA, arXiv 2106.09685), alpha is the rank."""
        return AdapterParameters(_new_pairs(weights, rank, np.random.default_rng([seed, 0])), float(rank))

    @classmethod
    def after(cls, file: AdaptedFile | None, weights: Weights, rank: int, seed: int) -> AdapterParameters:
        """What a file holds that was trained before; without one an adapter that adds nothing yet.

        Raises:
            TrainingError: the file's adapter has another rank.
        """
        if file is None:
            return cls.begin(weights, rank, seed)
        if file.rank != rank:
            raise TrainingError(f"the file to begin with has rank {file.rank}: ask for the same with --rank")
        return AdapterParameters(pairs_of(file.adapter, weights.embedding.device), file.alpha)

    @property
    def rank(self) -> int:
        """r; 0 without an adapter."""
        return next((len(a) for a, _ in self.pairs.values()), 0)

    @property
    def adapter_leaves(self) -> list[Tensor]:
        return [half for pair in self.pairs.values() for half in pair]

    def adapter(self, dtype: torch.dtype, rows: Tensor | None = None) -> LowRankAdapter | None:
        """The adapter in the compute type, for these rows, int64 [n], or for all."""
        if not self.pairs:
            return None
        pairs = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in self.pairs.items()}
        return LowRankAdapter(pairs, self.alpha / self.rank, rows)

    def arrays(self) -> dict[str, tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]]:
        """The pairs as a file holds them, in float16."""
        halves = {name: tuple(half.detach().cpu().numpy().astype(np.float16) for half in pair) for name, pair in self.pairs.items()}
        return {name: (a, b) for name, (a, b) in halves.items()}


def pairs_of(
    arrays: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs that a file holds, as leaves."""
    return {name: (_leaf(a, device), _leaf(b, device)) for name, (a, b) in arrays.items()}


@dataclass(frozen=True)
class Parameters(AdapterParameters):
    """An adapter, and the embedding table of Nexus tokens.

    table: [K, n_embd], float32 with a gradient
    """

    table: Tensor

    @classmethod
    def new(cls, weights: Weights, k: int, rank: int, seed: int) -> Parameters:
        """A table that looks like token embeddings, and an adapter that adds nothing yet; rank 0 is no adapter.

        The table is normal with the mean and the standard deviation, of each number, of 4,096 random token embeddings as the first layer
        gets them. The adapter is as in `begin`.
        """
        hyper, device = weights.hyper, weights.embedding.device
        rng = np.random.default_rng([seed, 0])
        chosen = torch.from_numpy(rng.integers(0, hyper.n_vocab, _N_SAMPLED)).to(device)
        sample = (weights.embedding[chosen].float() * hyper.embedding_scale).cpu().numpy()
        table = sample.mean(0) + sample.std(0) * rng.standard_normal((k, hyper.n_embd))
        return cls(_new_pairs(weights, rank, rng), float(rank), _leaf(table, device))

    @classmethod
    def of(cls, file: NexusFile, device: torch.device) -> Parameters:
        """What a Nexus file holds."""
        return cls(pairs_of(file.adapter, device), file.alpha, _leaf(file.table, device))

    @property
    def leaves(self) -> list[Tensor]:
        return [self.table, *self.adapter_leaves]


def _new_pairs(weights: Weights, rank: int, rng: np.random.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    device, pairs = weights.embedding.device, {}
    for i, layer in enumerate(weights.layers if rank else ()):
        for name in LINEAR:
            n_out, n_in = layer[name + ".weight"].shape
            a = rng.uniform(-1, 1, (rank, n_in)) / math.sqrt(n_in)
            pairs[f"blk.{i}.{name}.weight"] = _leaf(a, device), _leaf(np.zeros((n_out, rank)), device)
    return pairs


def _leaf(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device).requires_grad_()
