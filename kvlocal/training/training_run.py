"""A training run: updates, held-out evaluations, and checkpoints that a killed run goes on from."""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kvlocal.training.checkpoint import TrainingError, load_checkpoint, save_checkpoint

_CLIP = 1.0  # of the gradient's norm
# of what a checkpoint holds; one of another form belongs to another run
_FORM = 2


class Saved(Protocol):
    """A file that can be written."""

    def save(self, path: Path) -> None: ...


@dataclass(frozen=True)
class Report:
    """One update, or one evaluation.

    step: updates made
    held_out: of an evaluation, means by their names; None for an update
    seconds: spent on it
    """

    step: int
    held_out: dict[str, float] | None = None
    seconds: float = 0.0


R = TypeVar("R", bound=Report)
F = TypeVar("F", bound=Saved)


@dataclass
class _Progress:
    """What a checkpoint holds besides parameters and optimiser; random numbers depend on seed and step alone.

    updates: what each of them found
    evaluations: what each of them found, with its `step`
    """

    step: int = 0
    seconds: float = 0.0
    updates: list[Any] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class TrainingRun(ABC, Generic[R, F]):
    """One training run. What an update is, an evaluation, and the file that is written, say its kinds.

    Args:
        path: the file that is trained. It is written at every checkpoint; what is needed to go on is beside it, in PATH.partial, until all is done.
        described: all that the result depends on, as JSON can hold it.
        leaves: what is trained.
        optimiser, schedule: of these.
        steps: updates, all in all.

    Raises:
        TrainingError: there is a checkpoint of a run that is described otherwise.
    """

    begins_with_evaluation: ClassVar[bool] = True

    def __init__(
        self,
        path: Path,
        described: Sequence[Any],
        leaves: Sequence[Tensor],
        optimiser: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        steps: int,
    ) -> None:
        self._path, self._checkpoint = path, path.with_name(path.name + ".partial")
        self._key = hashlib.sha256(json.dumps([_FORM, *described], sort_keys=True).encode()).hexdigest()
        self._leaves, self._optimiser, self._schedule, self._steps = leaves, optimiser, schedule, steps
        self._stopped = False
        state = load_checkpoint(self._checkpoint, self._key, leaves, optimiser, schedule)
        self._progress = _Progress(**state) if state is not None else _Progress()

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self._progress.step

    @property
    def updates(self) -> list[Any]:
        """What each update so far found."""
        return list(self._progress.updates)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """What each held-out evaluation found, with its `step`."""
        return list(self._progress.evaluations)

    def stop(self) -> None:
        """Makes `run` end after the update it is at, as when the time is over. May be called by a signal's handler."""
        self._stopped = True

    def run(
        self,
        report: Callable[[R], None],
        *,
        evaluate_every: int = 50,
        checkpoint_seconds: float = 120.0,
        limit_seconds: float = math.inf,
    ) -> F:
        """Trains to the last update, or until the time is over, and writes the file.

        Args:
            report: gets every update and every evaluation.
            evaluate_every: updates from one evaluation to the next; one more comes at the end. 0 for none at all.
            checkpoint_seconds: from one checkpoint to the next.
            limit_seconds: of training in this call; a run that it stops can be gone on with.

        Raises:
            TrainingError: a gradient is not finite any more.
            KvlocalError: an update failed, or a file cannot be written.
        """
        if evaluate_every and self.begins_with_evaluation and not self._progress.evaluations:
            report(self._evaluated())
        started = saved = time.monotonic()
        while self.step < self._steps and not self._stopped and time.monotonic() - started < limit_seconds:
            report(self._updated())
            if evaluate_every and self.step % evaluate_every == 0 and self.step < self._steps:
                report(self._evaluated())
            if time.monotonic() - saved >= checkpoint_seconds:
                self._save()
                saved = time.monotonic()
        if self.step < self._steps:
            self._save()
        else:
            if evaluate_every:
                report(self._evaluated())
            self.file().save(self._path)
            self._checkpoint.unlink(missing_ok=True)
        return self.file()

    @abstractmethod
    def file(self) -> F:
        """What is trained so far."""

    @abstractmethod
    def _gradients(self) -> tuple[Any, dict[str, Any]]:
        """Computes the gradients of the next update.

        Returns:
            What is kept of the update, as JSON can hold it, and what its report says beside step and seconds.
        """

    @abstractmethod
    def _held_out_means(self) -> dict[str, float]:
        """What an evaluation finds; nothing where nothing is held out."""

    @abstractmethod
    def _report(self, step: int, **told: Any) -> R:
        """Of an update or an evaluation."""

    def _record(self, settings: dict[str, Any], data: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """What a file tells of its training."""
        return {
            "settings": settings,
            "data": data,
            "torch": torch.__version__,
            "device": device.type,
            "seconds": round(self._progress.seconds, 1),
            "steps": self.step,
            "evaluations": self._progress.evaluations,
        }

    def _updated(self) -> R:
        """One step of the optimiser."""
        started = time.monotonic()
        kept, told = self._gradients()
        norm = torch.nn.utils.clip_grad_norm_(self._leaves, _CLIP)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the gradient is not finite any more after {self.step} updates: start anew with another --seed, a lower --rate or --dtype float32"
            )
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()
        seconds = time.monotonic() - started
        self._progress.step += 1
        self._progress.seconds += seconds
        self._progress.updates.append(kept)
        return self._report(self.step, seconds=seconds, **told)

    def _evaluated(self) -> R:
        started = time.monotonic()
        means = self._held_out_means()
        if means:
            self._progress.evaluations.append({"step": self.step} | {name: round(value, 5) for name, value in means.items()})
        return self._report(self.step, held_out=means, seconds=time.monotonic() - started)

    def _save(self) -> None:
        """Writes what the run goes on from, and the file as it is now."""
        save_checkpoint(self._checkpoint, self._key, self._leaves, self._optimiser, self._schedule, asdict(self._progress))
        self.file().save(self._path)
