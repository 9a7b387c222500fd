"""Trains an adapter for a compressed cache by reinforcement learning: rollouts, what they teach, and rewards on held-out tasks."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from kvlocal.training.decoder import Decoder
from kvlocal.training.grpo import advantages, policy_gradient
from kvlocal.training.parameters import AdapterParameters
from kvlocal.training.rewards import rewards
from kvlocal.training.rollouts import Group, Rollouts, exact_cache
from kvlocal.training.tasks import CheckedTask
from kvlocal.training.training_run import Report, TrainingRun
from kvlocal.training.weights import Weights

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
class RLReport(Report):
    """One update, or one evaluation, whose means are rewards by ratio, such as "reward@0.8".

    reward: mean over the answers of an update
    signal: share of its tasks whose answers were neither all right nor all wrong
    cut: share of its answers that were cut off
    largest, mean: difference of the log-probabilities of the drawn tokens in PyTorch from those in llama.cpp; not a number without signal
    """

    reward: float = math.nan
    signal: float = math.nan
    cut: float = math.nan
    largest: float = math.nan
    mean: float = math.nan


class RLTraining(TrainingRun[RLReport, AdaptedFile]):
    """One training run.

    The answers of an update are drawn by the very model that the update changes (on-policy), so there is no clipping and no reference model.

    Args:
        base: the model, the very file that is used later.
        base_name: what users call it.
        tasks, held_out: to train on, all of them before one comes twice, and to evaluate with.
        settings: see RLSettings.
        path: the adapter's file, see TrainingRun.
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
        self._base, self._base_name, self._settings = base, base_name, settings
        self._tasks, self._held_out = tasks, held_out[: settings.n_held_out]
        self._n_gpu_layers, self._n_threads = n_gpu_layers, n_threads
        self._base_hash, self._digest = base_hash(base), digest(tasks)
        self._decoder = Decoder(Weights.load(base, getattr(torch, settings.dtype), device))
        self._parameters = AdapterParameters.after(start, self._decoder.weights, settings.rank, settings.seed)
        leaves = self._parameters.adapter_leaves
        optimiser = torch.optim.AdamW(leaves, lr=settings.rate, weight_decay=0.0)
        warm_up = max(1, round(_WARM_UP * settings.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / warm_up))
        described = ["rl", asdict(settings), self._base_hash, self._digest, digest(self._held_out)]
        super().__init__(path, described, leaves, optimiser, schedule, settings.steps)

    def file(self) -> AdaptedFile:
        """What is trained so far; the adapter in float16."""
        data = {"sha256": self._digest, "training": len(self._tasks), "held_out": len(self._held_out)}
        record = self._record(asdict(self._settings), data, self._decoder.device) | {"updates": self.updates}
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

    def _gradients(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Draws answers; the gradients are what those groups teach that have right and wrong ones."""
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
        told = {
            "reward": float(np.mean([group.rewards.mean() for group in groups])),
            "signal": len(telling) / len(groups),
            "cut": float(np.mean([answer.cut for group in groups for answer in group.answers])),
        }
        if telling:
            told |= {"largest": max(one.largest for one in apart), "mean": sum(one.mean * one.n for one in apart) / n_tokens}
        kept = {name: round(value, 5) for name, value in told.items()}
        return {"step": step + 1, "ratio": ratio} | kept | _by_kind(groups), told

    def _held_out_means(self) -> dict[str, float]:
        means = {}
        for ratio in self._settings.ratios if self._held_out else ():
            with self._rollouts(ratio, self._settings.temperature) as rollouts:
                means[f"reward@{ratio:g}"] = float(rewards(rollouts, self._held_out, self._settings.seed, _HELD_OUT_ANSWERS).mean())
        return means

    def _report(self, step: int, **told: Any) -> RLReport:
        return RLReport(step, **told)


def _by_kind(groups: Sequence[Group]) -> dict[str, float]:
    """Mean reward of each kind of task."""
    kinds = sorted({group.task.kind for group in groups})
    return {f"reward {kind}": round(float(np.mean([group.rewards.mean() for group in groups if group.task.kind == kind])), 5) for kind in kinds}


def digest(tasks: Sequence[CheckedTask]) -> str:
    """SHA-256 of tasks."""
    return hashlib.sha256(json.dumps([task.record() for task in tasks], sort_keys=True).encode()).hexdigest()
