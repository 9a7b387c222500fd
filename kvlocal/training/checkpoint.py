"""What a training run goes on from when it was interrupted, also by kill -9."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import atomic_write

_WARM_UP = 0.05  # of all updates
_LAST_RATE = 0.05  # of the full rate


class TrainingError(KvlocalError):
    """Training cannot start or go on."""


def warm_up_then_cosine(step: int, steps: int) -> float:
    """The share of the full learning rate at an update: a linear warm-up, then a cosine."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def save_checkpoint(
    path: Path,
    key: str,
    leaves: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    state: dict[str, Any],
) -> None:
    """Writes the file, or leaves what was there as it was.

    key: names the run by everything its result depends on
    state: what else the run goes on from, as JSON could hold it

    Raises KvlocalError if it cannot be written.
    """
    content = io.BytesIO()
    torch.save(
        {
            "key": key,
            "leaves": [leaf.detach().cpu() for leaf in leaves],
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "state": state,
        },
        content,
    )
    atomic_write(path, content.getvalue())


def load_checkpoint(
    path: Path, key: str, leaves: Sequence[Tensor], optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> dict[str, Any] | None:
    """Puts back what `save_checkpoint` wrote, and returns the state; None if there is no such file.

    Raises:
        TrainingError: it cannot be read, or it is of a run with another key.
    """
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["key"]
    except Exception as error:
        raise TrainingError(f"{path} is no checkpoint that can be read: remove it to start anew") from error
    if found != key:
        raise TrainingError(
            f"{path} is of a run with other settings, data or another model: repeat that command to go on with it, or remove the file to start anew"
        )
    with torch.no_grad():
        for leaf, values in zip(leaves, saved["leaves"], strict=True):
            leaf.copy_(values)
    optimiser.load_state_dict(saved["optimiser"])
    schedule.load_state_dict(saved["schedule"])
    state: dict[str, Any] = saved["state"]
    return state
