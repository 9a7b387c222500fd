"""Trains an adapter for a compressed cache by distillation: updates, held-out evaluation, checkpoints that a killed run goes on from."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvlocal import policies
from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import Container
from kvlocal.nexus.base import base_hash
from kvlocal.training.adapted_file import AdaptedFile
from kvlocal.training.chats import Chats, TrainingChat
from kvlocal.training.checkpoint import TrainingError, load_checkpoint, save_checkpoint, warm_up_then_cosine
from kvlocal.training.compressed_distillation import FULL, Student, TaughtChat
from kvlocal.training.decoder import Decoder, LowRankAdapter
from kvlocal.training.parameters import AdapterParameters, pairs_of
from kvlocal.training.policy_choice import SOURCES
from kvlocal.training.weights import Weights

_CLIP = 1.0


@dataclass(frozen=True)
class DistillSettings:
    """Everything that the result depends on, besides model, data and hardware.

    steps: updates
    batch: chats an update
    students: compressions of each of them, which share the teacher's reading
    policies, ratios: of the students, drawn for each; every ratio is above 0
    whole: share of the students whose cache is not compressed, so that they stay what they are
    stride: cells by which the cache grows before it is compressed again
    rank: of the adapter
    rate: learning rate of AdamW
    temperature: that logits are divided by
    max_tokens: tokens of a chat
    n_held_out: chats that are evaluated at most
    seed: of everything random
    start: SHA-256 of the file whose adapter training begins with; empty for one that adds nothing yet
    dtype: that matrices are multiplied in, "float32" or "bfloat16"
    """

    steps: int = 300
    batch: int = 2
    students: int = 2
    policies: tuple[str, ...] = ("gkv", "snapkv", "streaming")
    ratios: tuple[float, ...] = (0.5, 0.8, 0.9)
    whole: float = 0.15
    stride: int = 128
    rank: int = 16
    rate: float = 5e-4
    temperature: float = 0.6
    max_tokens: int = 1024
    n_held_out: int = 8
    seed: int = 0
    start: str = ""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in self.policies:
            check_policy(name)


def check_policy(name: str) -> None:
    """Raises KvlocalError unless training can let this policy choose."""
    policy = policies.make(name)
    if not policy.evicts or policy.needs - SOURCES:
        known = ", ".join(one for one in policies.POLICIES if (made := policies.make(one)).evicts and not made.needs - SOURCES)
        raise KvlocalError(f"the policy {name} cannot choose in training: choose among {known}")


@dataclass(frozen=True)
class DistillReport:
    """One update, or one evaluation.

    step: updates made
    kl: of an update, mean over its students, at the temperature of training
    held_out: of an evaluation, mean KL by student, such as "gkv@0.8", in nats per token; empty for an update
    seconds: spent on it
    """

    step: int
    kl: float = math.nan
    held_out: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class _Progress:
    """What a checkpoint holds besides parameters and optimiser; random numbers depend on seed and step alone."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class DistillTraining:
    """One training run.

    Args:
        base: the model, the very file that is used later.
        base_name: what users call it.
        chats: to train on and to evaluate with.
        settings: see DistillSettings.
        path: the adapter's file. It is written at every checkpoint; what is needed to go on is beside it, in PATH.partial, until all is done.
        device: where to compute, such as "cpu" or "cuda".
        start: the file whose adapter training begins with.

    Raises:
        TrainingError: there is a checkpoint of a run with other settings, or the file to begin with has another rank.
        WeightsError: the model is not one that the decoder knows.
    """

    def __init__(
        self, base: Container, base_name: str, chats: Chats, settings: DistillSettings, path: Path, device: str, start: AdaptedFile | None = None
    ) -> None:
        self._base, self._base_name, self._chats, self._settings = base, base_name, chats, settings
        self._path, self._checkpoint = path, path.with_name(path.name + ".partial")
        self._base_hash = base_hash(base)
        described = ["distill", asdict(settings), self._base_hash, chats.digests]
        self._key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self._decoder = Decoder(Weights.load(base, getattr(torch, settings.dtype), device))
        self._held_out = chats.chats_of(chats.held_out, settings.n_held_out, settings.max_tokens)
        if start:
            if start.rank != settings.rank:
                raise TrainingError(f"the file to begin with has rank {start.rank}: ask for the same with --rank")
            self._parameters = AdapterParameters(pairs_of(start.adapter, self._decoder.device), start.alpha)
        else:
            self._parameters = AdapterParameters.begin(self._decoder.weights, settings.rank, settings.seed)
        self._optimiser = torch.optim.AdamW(self._parameters.adapter_leaves, lr=settings.rate, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, partial(warm_up_then_cosine, steps=settings.steps))
        self._state = _Progress()
        self._stopped = False
        state = load_checkpoint(self._checkpoint, self._key, self._parameters.adapter_leaves, self._optimiser, self._schedule)
        if state is not None:
            self._state = _Progress(**state)

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self._state.step

    @property
    def losses(self) -> list[float]:
        """KL of each update so far."""
        return list(self._state.losses)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """What each held-out evaluation found, with its `step`."""
        return list(self._state.evaluations)

    def stop(self) -> None:
        """Makes `run` end after the update it is at, as when the time is over. May be called by a signal's handler."""
        self._stopped = True

    def run(
        self,
        report: Callable[[DistillReport], None],
        *,
        evaluate_every: int = 50,
        checkpoint_seconds: float = 120.0,
        limit_seconds: float = math.inf,
    ) -> AdaptedFile:
        """Trains to the last update, or until the time is over, and writes the file.

        Args:
            report: gets every update and every evaluation, the first before the first update.
            evaluate_every: updates from one evaluation to the next; one more comes at the end.
            checkpoint_seconds: from one checkpoint to the next.
            limit_seconds: of training in this call; a run that it stops can be gone on with.

        Raises:
            TrainingError: a loss is not finite any more.
        """
        steps = self._settings.steps
        if not self._state.evaluations:
            report(self._evaluate())
        started = saved = time.monotonic()
        while self.step < steps and not self._stopped and time.monotonic() - started < limit_seconds:
            report(self._update())
            if self.step % evaluate_every == 0 and self.step < steps:
                report(self._evaluate())
            if time.monotonic() - saved >= checkpoint_seconds:
                self._save()
                saved = time.monotonic()
        if self.step < steps:
            self._save()
        else:
            report(self._evaluate())
            self.file().save(self._path)
            self._checkpoint.unlink(missing_ok=True)
        return self.file()

    def file(self) -> AdaptedFile:
        """What is trained so far; the adapter in float16."""
        settings = self._settings
        record = {
            "settings": asdict(settings),
            "data": {"sha256": self._chats.digests, "training": len(self._chats.training), "held_out": len(self._chats.held_out)},
            "torch": torch.__version__,
            "device": self._decoder.device.type,
            "seconds": round(self._state.seconds, 1),
            "steps": self.step,
            "losses": [round(loss, 5) for loss in self._state.losses],
            "evaluations": self._state.evaluations,
        }
        return AdaptedFile(
            adapter=self._parameters.arrays(),
            alpha=self._parameters.alpha,
            architecture=self._decoder.hyper.family,
            base_name=self._base_name,
            base_hash=self._base_hash,
            method="distill",
            policies=settings.policies,
            ratios=((0.0,) if settings.whole else ()) + settings.ratios,
            record=record,
        )

    def _update(self) -> DistillReport:
        """One step of AdamW on the mean loss of a batch's students."""
        started = time.monotonic()
        settings, decoder = self._settings, self._decoder
        kls = []
        for i in range(settings.batch):
            n = self.step * settings.batch + i
            rng = np.random.default_rng([settings.seed, 1, n])
            taught = TaughtChat(decoder, self._chats.nth(n, settings.seed, settings.max_tokens))
            for _ in range(settings.students):
                student = Student.sample(rng, settings.policies, settings.ratios, settings.stride, settings.whole)
                loss = taught.kl(student, self._parameters.adapter(decoder.dtype), settings.temperature)
                if loss is not None:
                    (loss / (settings.batch * settings.students)).backward()
                    kls.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.adapter_leaves, _CLIP)
        if not torch.isfinite(norm):
            raise TrainingError(f"the loss is not finite any more after {self.step} updates: start anew with a lower --rate or --dtype float32")
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()
        state = self._state
        state.step += 1
        state.losses.append(float(np.mean(kls)) if kls else math.nan)
        seconds = time.monotonic() - started
        state.seconds += seconds
        return DistillReport(state.step, state.losses[-1], seconds=seconds)

    def _evaluate(self) -> DistillReport:
        started = time.monotonic()
        settings = self._settings
        adapter = self._parameters.adapter(self._decoder.dtype)
        means = mean_divergences(self._decoder, self._held_out, adapter, settings.policies, settings.ratios, settings.stride)
        self._state.evaluations.append({"step": self.step} | {name: round(value, 5) for name, value in means.items()})
        return DistillReport(self.step, held_out=means, seconds=time.monotonic() - started)

    def _save(self) -> None:
        """Writes what the run goes on from, and the adapter as it is now."""
        save_checkpoint(self._checkpoint, self._key, self._parameters.adapter_leaves, self._optimiser, self._schedule, asdict(self._state))
        self.file().save(self._path)


def mean_divergences(
    decoder: Decoder, chats: Sequence[TrainingChat], adapter: LowRankAdapter | None, names: Sequence[str], ratios: Sequence[float], stride: int
) -> dict[str, float]:
    """KL(full without adapter || compressed with it), mean over chats, in nats per token of an answer, by student."""
    found = [divergences(decoder, chat, adapter, names, ratios, stride) for chat in chats]
    return {name: float(np.mean([one[name] for one in found if name in one])) for name in dict.fromkeys(name for one in found for name in one)}


@torch.no_grad()
def divergences(
    decoder: Decoder, chat: TrainingChat, adapter: LowRankAdapter | None, names: Sequence[str], ratios: Sequence[float], stride: int
) -> dict[str, float]:
    """KL(full without adapter || compressed with it) of one chat, in nats per token of an answer.

    By student, such as "gkv@0.8", and FULL for the adapter without compression. Students that are never compressed in this chat are left out.
    """
    taught = TaughtChat(decoder, chat)
    students = [Student(FULL, 0.0, stride), *(Student(name, ratio, stride) for ratio in ratios for name in names)]
    kls = {student.name: taught.kl(student, adapter) for student in students}
    return {name: kl.item() for name, kl in kls.items() if kl is not None}
