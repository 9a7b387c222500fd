"""Trains an adapter for a compressed cache by reinforcement learning: rollouts, updates, checkpoints that a killed run goes on from."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import Container
from kvlocal.llama.adapter import Lora
from kvlocal.llama.model import Model
from kvlocal.nexus.base import base_hash
from kvlocal.training.adapted_file import AdaptedFile
from kvlocal.training.checkpoint import TrainingError, load_checkpoint, save_checkpoint
from kvlocal.training.decoder import Decoder
from kvlocal.training.grpo import advantages, policy_gradient
from kvlocal.training.parameters import AdapterParameters, pairs_of
from kvlocal.training.rewards import rewards
from kvlocal.training.rollouts import Group, Rollouts, exact_cache
from kvlocal.training.tasks import CheckedTask
from kvlocal.training.weights import Weights

_CLIP = 1.0
_WARM_UP = 0.05  # of all updates; then the rate stays (G-KV)
_HELD_OUT_ANSWERS = 4  # to each task of an evaluation


@dataclass(frozen=True)
class RLSettings:
    """Everything that the result depends on, besides model, tasks and hardware.

    steps: updates
    tasks: of an update
    answers: to each task
    temperature: that they are drawn at, above 0
    max_tokens: of an answer
    policy: what chooses the cells
    ratios: one of which the cells of an update are chosen with; 0 is no compression
    stride: cells by which the cache grows before it is compressed again
    rank: of the adapter
    rate: learning rate of AdamW
    n_cells: of an answer's cache at most, conversation and answer
    parallel: answers that are drawn at a time; batches of another size round differently
    n_held_out: tasks that are evaluated at most
    seed: of everything random
    start: SHA-256 of the file whose adapter training begins with; empty for a new one
    dtype: that matrices are multiplied in, "float32" or "bfloat16"

    Raises:
        KvlocalError: a value is out of range.
    """

    steps: int = 100
    tasks: int = 8
    answers: int = 8
    temperature: float = 0.8
    max_tokens: int = 32
    policy: str = "gkv"
    ratios: tuple[float, ...] = (0.8,)
    stride: int = 128
    rank: int = 16
    rate: float = 1e-4
    n_cells: int = 2048
    parallel: int = 8
    n_held_out: int = 20
    seed: int = 0
    start: str = ""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.answers < 2:
            raise KvlocalError(f"{self.answers} answers to a task teach nothing, as they are compared with each other: ask for at least 2")
        for ratio in self.ratios:
            self.config(ratio)

    def config(self, ratio: float, n_threads: int | None = None) -> SessionConfig:
        """How the cache of an answer is kept."""
        return exact_cache(
            SessionConfig(policy=self.policy, ratio=ratio, budget=self.n_cells, stride=self.stride, archive="off", n_threads=n_threads)
        )


@dataclass(frozen=True)
class RLReport:
    """One update, or one evaluation.

    step: updates made
    reward: mean over the answers of an update
    signal: share of its tasks whose answers were neither all right nor all wrong
    cut: share of its answers that were cut off
    largest, mean: difference of the log-probabilities of the drawn tokens in PyTorch from those in llama.cpp; not a number without signal
    held_out: of an evaluation, mean rewards by ratio, such as "reward@0.8"; empty for an update
    seconds: spent on it
    """

    step: int
    reward: float = math.nan
    signal: float = math.nan
    cut: float = math.nan
    largest: float = math.nan
    mean: float = math.nan
    held_out: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class _RLProgress:
    """What a checkpoint holds besides parameters and optimiser; random numbers depend on seed and step alone."""

    step: int = 0
    seconds: float = 0.0
    updates: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class RLTraining:
    """One training run.

    The answers of an update are drawn by the very model that the update changes (on-policy), so there is no clipping and no reference model.

    Args:
        base: the model, the very file that is used later.
        base_name: what users call it.
        tasks, held_out: to train on, all of them before one comes twice, and to evaluate with.
        settings: see RLSettings.
        path: the adapter's file. It is written at every checkpoint; what is needed to go on is beside it, in PATH.partial, until all is done.
        device: where PyTorch computes, such as "cpu" or "cuda".
        n_gpu_layers, n_threads: of llama.cpp, as for Model and CacheConfig.
        start: the file whose adapter training begins with.

    Raises:
        TrainingError: there is a checkpoint of a run with other settings, or the file to begin with has another rank.
        WeightsError: the model is not one that the decoder knows.
    """

    def __init__(
        self, base: Container, base_name: str, tasks: Sequence[CheckedTask], held_out: Sequence[CheckedTask], settings: RLSettings, path: Path,
        device: str, *, n_gpu_layers: int = -1, n_threads: int | None = None, start: AdaptedFile | None = None,
    ) -> None:
        self._base, self._base_name, self._settings, self._path = base, base_name, settings, path
        self._tasks, self._held_out = tasks, held_out[: settings.n_held_out]
        self._n_gpu_layers, self._n_threads = n_gpu_layers, n_threads
        self._checkpoint = path.with_name(path.name + ".partial")
        self._base_hash, self._digest = base_hash(base), digest(tasks)
        described = ["rl", asdict(settings), self._base_hash, self._digest, digest(self._held_out)]
        self._key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self._decoder = Decoder(Weights.load(base, getattr(torch, settings.dtype), device))
        if start is None:
            self._parameters = AdapterParameters.begin(self._decoder.weights, settings.rank, settings.seed)
        elif start.rank == settings.rank:
            self._parameters = AdapterParameters(pairs_of(start.adapter, self._decoder.device), start.alpha)
        else:
            raise TrainingError(f"the file to begin with has rank {start.rank}: ask for the same with --rank")
        self._optimiser = torch.optim.AdamW(self._parameters.adapter_leaves, lr=settings.rate, weight_decay=0.0)
        warm_up = max(1, round(_WARM_UP * settings.steps))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, lambda step: min(1.0, (step + 1) / warm_up))
        self._state = _RLProgress()
        self._stopped = False
        state = load_checkpoint(self._checkpoint, self._key, self._parameters.adapter_leaves, self._optimiser, self._schedule)
        if state is not None:
            self._state = _RLProgress(**state)

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self._state.step

    @property
    def updates(self) -> list[dict[str, float]]:
        """What RLReport tells of each update so far, by its names."""
        return list(self._state.updates)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """What each held-out evaluation found, with its `step`."""
        return list(self._state.evaluations)

    def stop(self) -> None:
        """Makes `run` end after the update it is at, as when the time is over. May be called by a signal's handler."""
        self._stopped = True

    def run(
        self,
        report: Callable[[RLReport], None],
        *,
        evaluate_every: int = 25,
        checkpoint_seconds: float = 120.0,
        limit_seconds: float = math.inf,
    ) -> AdaptedFile:
        """Trains to the last update, or until the time is over, and writes the file.

        Args:
            report: gets every update and every evaluation, the first before the first update.
            evaluate_every: updates from one evaluation to the next; one more comes at the end. 0 for none at all.
            checkpoint_seconds: from one checkpoint to the next.
            limit_seconds: of training in this call; a run that it stops can be gone on with.

        Raises:
            TrainingError: a gradient is not finite any more.
            KvlocalError: a rollout failed, or a file cannot be written.
        """
        started = saved = time.monotonic()
        steps = self._settings.steps
        if evaluate_every and not self._state.evaluations:
            report(self._evaluate())
        while self.step < steps and not self._stopped and time.monotonic() - started < limit_seconds:
            report(self._update())
            if evaluate_every and self.step % evaluate_every == 0 and self.step < steps:
                report(self._evaluate())
            if time.monotonic() - saved >= checkpoint_seconds:
                self._save()
                saved = time.monotonic()
        if self.step < steps:
            self._save()
        else:
            if evaluate_every:
                report(self._evaluate())
            self.file().save(self._path)
            self._checkpoint.unlink(missing_ok=True)
        return self.file()

    def file(self) -> AdaptedFile:
        """What is trained so far; the adapter in float16."""
        settings, state = self._settings, self._state
        record = {
            "settings": asdict(settings),
            "data": {"sha256": self._digest, "training": len(self._tasks), "held_out": len(self._held_out)},
            "torch": torch.__version__,
            "device": self._decoder.device.type,
            "seconds": round(state.seconds, 1),
            "steps": self.step,
            "updates": state.updates,
            "evaluations": state.evaluations,
        }
        return self._file(self._parameters.arrays(), record)

    def _file(self, arrays: dict[str, Any], record: dict[str, Any]) -> AdaptedFile:
        return AdaptedFile(
            adapter=arrays,
            alpha=self._parameters.alpha,
            architecture=self._decoder.hyper.family,
            base_name=self._base_name,
            base_hash=self._base_hash,
            method="rl",
            policies=(self._settings.policy,),
            ratios=self._settings.ratios,
            record=record,
        )

    @contextmanager
    def _rollouts(self, ratio: float, temperature: float) -> Iterator[Rollouts]:
        """What answers with the adapter as it is now, in float32, so that the probabilities of its tokens are those that PyTorch computes."""
        settings = self._settings
        exact = {
            name: (a.detach().cpu().numpy(), b.detach().cpu().numpy()) for name, (a, b) in self._parameters.pairs.items()
        }
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "now.lora.gguf")
            self._file(exact, {}).save(path)
            with Model(self._base.path, n_gpu_layers=self._n_gpu_layers, lora=[Lora(path)]) as model, Rollouts(
                model, settings.config(ratio, self._n_threads), parallel=settings.parallel, temperature=temperature, max_tokens=settings.max_tokens
            ) as rollouts:
                yield rollouts

    def _tasks_of(self, step: int) -> list[CheckedTask]:
        """Those of an update, all of them in a new order in each round."""
        found = []
        for n in range(step * self._settings.tasks, (step + 1) * self._settings.tasks):
            order = np.random.default_rng([self._settings.seed, 2, n // len(self._tasks)]).permutation(len(self._tasks))
            found.append(self._tasks[order[n % len(self._tasks)]])
        return found

    def _update(self) -> RLReport:
        """Draws answers, and makes one step of AdamW on what those groups teach that have right and wrong ones."""
        started = time.monotonic()
        settings, decoder, step = self._settings, self._decoder, self.step
        ratio = float(np.random.default_rng([settings.seed, 1, step]).choice(settings.ratios))
        tasks = self._tasks_of(step)
        with self._rollouts(ratio, settings.temperature) as rollouts:
            groups = rollouts.groups(tasks, [[settings.seed, 3, step, i] for i in range(len(tasks))], settings.answers)
        telling = [group for group in groups if advantages(group).any()]
        n_tokens = sum(len(answer.tokens) for group in telling for answer in group.answers)
        apart = [
            policy_gradient(decoder, group, self._parameters.adapter(decoder.dtype), settings.temperature, 1 / n_tokens) for group in telling
        ]
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.adapter_leaves, _CLIP)
        if not torch.isfinite(norm):
            raise TrainingError(f"the gradient is not finite any more after {step} updates: start anew with a lower --rate or --dtype float32")
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()
        report = RLReport(
            step + 1,
            reward=float(np.mean([group.rewards.mean() for group in groups])),
            signal=len(telling) / len(groups),
            cut=float(np.mean([answer.cut for group in groups for answer in group.answers])),
            largest=max((one.largest for one in apart), default=math.nan),
            mean=sum(one.mean * one.n for one in apart) / n_tokens if n_tokens else math.nan,
            seconds=time.monotonic() - started,
        )
        self._state.step += 1
        self._state.seconds += report.seconds
        kept = {name: round(getattr(report, name), 5) for name in ("reward", "signal", "cut", "largest", "mean")}
        known = {name: value for name, value in kept.items() if not math.isnan(value)}
        self._state.updates.append({"step": step + 1, "ratio": ratio} | known | _by_kind(groups))
        return report

    def _evaluate(self) -> RLReport:
        started = time.monotonic()
        means = {}
        for ratio in self._settings.ratios:
            with self._rollouts(ratio, self._settings.temperature) as rollouts:
                means[f"reward@{ratio:g}"] = float(rewards(rollouts, self._held_out, self._settings.seed, _HELD_OUT_ANSWERS).mean())
        self._state.evaluations.append({"step": self.step} | {name: round(value, 5) for name, value in means.items()})
        return RLReport(self.step, held_out=means, seconds=time.monotonic() - started)

    def _save(self) -> None:
        """Writes what the run goes on from, and the adapter as it is now."""
        save_checkpoint(self._checkpoint, self._key, self._parameters.adapter_leaves, self._optimiser, self._schedule, asdict(self._state))
        self.file().save(self._path)


def _by_kind(groups: Sequence[Group]) -> dict[str, float]:
    """Mean reward of each kind of task."""
    kinds = sorted({group.task.kind for group in groups})
    return {f"reward {kind}": round(float(np.mean([group.rewards.mean() for group in groups if group.task.kind == kind])), 5) for kind in kinds}


def digest(tasks: Sequence[CheckedTask]) -> str:
    """SHA-256 of tasks."""
    return hashlib.sha256(json.dumps([task.record() for task in tasks], sort_keys=True).encode()).hexdigest()
