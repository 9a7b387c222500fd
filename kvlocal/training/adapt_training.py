"""Trains an adapter for a compressed cache by distillation: its updates, and what they are worth on held-out chats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from kvlocal.training.checkpoint import warm_up_then_cosine
from kvlocal.training.compressed_distillation import FULL, Student, TaughtChat
from kvlocal.training.decoder import Decoder, LowRankAdapter
from kvlocal.training.parameters import AdapterParameters
from kvlocal.training.policy_choice import SOURCES
from kvlocal.training.training_run import Report, TrainingRun
from kvlocal.training.weights import Weights


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
class DistillReport(Report):
    """One update, or one evaluation, whose means are KL by student, such as "gkv@0.8", in nats per token.

    kl: of an update, mean over its students, at the temperature of training; not a number where none was compressed
    """

    kl: float = math.nan


class DistillTraining(TrainingRun[DistillReport, AdaptedFile]):
    """One training run.

    Args:
        base: the model, the very file that is used later.
        base_name: what users call it.
        chats: to train on and to evaluate with.
        settings: see DistillSettings.
        path: the adapter's file, see TrainingRun.
        device: where to compute, such as "cpu" or "cuda".
        start: the file whose adapter training begins with.

    Raises:
        TrainingError: there is a checkpoint of a run with other settings, or the file to begin with has another rank.
        WeightsError: the model is not one that the decoder knows.
    """

    def __init__(
        self, base: Container, base_name: str, chats: Chats, settings: DistillSettings, path: Path, device: str, start: AdaptedFile | None = None
    ) -> None:
        self._base_name, self._chats, self._settings, self._base_hash = base_name, chats, settings, base_hash(base)
        self._decoder = Decoder(Weights.load(base, getattr(torch, settings.dtype), device))
        self._held_out = chats.chats_of(chats.held_out, settings.n_held_out, settings.max_tokens)
        self._parameters = AdapterParameters.after(start, self._decoder.weights, settings.rank, settings.seed)
        leaves = self._parameters.adapter_leaves
        optimiser = torch.optim.AdamW(leaves, lr=settings.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(warm_up_then_cosine, steps=settings.steps))
        described = ["distill", asdict(settings), self._base_hash, chats.digests]
        super().__init__(path, described, leaves, optimiser, schedule, settings.steps)

    def file(self) -> AdaptedFile:
        """What is trained so far; the adapter in float16."""
        settings = self._settings
        data = {"sha256": self._chats.digests, "training": len(self._chats.training), "held_out": len(self._chats.held_out)}
        return AdaptedFile(
            adapter=self._parameters.arrays(),
            alpha=self._parameters.alpha,
            architecture=self._decoder.hyper.family,
            base_name=self._base_name,
            base_hash=self._base_hash,
            method="distill",
            policies=settings.policies,
            ratios=((0.0,) if settings.whole else ()) + settings.ratios,
            record=self._record(asdict(settings), data, self._decoder.device) | {"losses": [round(loss, 5) for loss in self.updates]},
        )

    def _gradients(self) -> tuple[float, dict[str, Any]]:
        """Of the mean loss of a batch's students."""
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
        kl = float(np.mean(kls)) if kls else math.nan
        return kl, {"kl": kl}

    def _held_out_means(self) -> dict[str, float]:
        settings = self._settings
        adapter = self._parameters.adapter(self._decoder.dtype)
        return mean_divergences(self._decoder, self._held_out, adapter, settings.policies, settings.ratios, settings.stride)

    def _report(self, step: int, **told: Any) -> DistillReport:
        return DistillReport(step, **told)


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
