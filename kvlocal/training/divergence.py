"""What a model loses with Nexus tokens in place of finished turns, in PyTorch, beside what it loses with raw cells and with nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvlocal.training.decoder import Decoder
from kvlocal.training.distil import Compression, Distillation
from kvlocal.training.examples import Example
from kvlocal.training.parameters import Parameters

# Nexus tokens' share of the cells kept, by the name a measurement has
SHARES = {"nexus": 1.0, "mixed": 0.5, "raw": 0.0}
NOTHING = "nothing"  # no cell of the history is kept


@torch.no_grad()
def divergences(decoder: Decoder, parameters: Parameters, example: Example, ratios: Sequence[float]) -> dict[str, float]:
    """KL(full || compressed) of a conversation, mean per token in nats, by what was kept of all segments but the last, such as "nexus@0.8"."""
    n_gone, k = len(example.segments) - 1, len(parameters.table)
    reading = Distillation(decoder, example, n_gone=[n_gone], with_masses=False)
    ways = {NOTHING: Compression.fixed(example, 1.0, 0.0, k)} | {
        f"{name}@{ratio:g}": Compression.fixed(example, ratio, share, k) for ratio in ratios for name, share in SHARES.items()
    }
    # nothing is drawn where no cell is chosen at random
    rng = np.random.default_rng(0)
    return {name: reading.loss(parameters, compression, rng).kl.item() for name, compression in ways.items()}
