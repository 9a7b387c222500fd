"""Trains Nexus tokens by distillation: its updates, and what the tokens are worth on held-out conversations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvlocal.gguf.container import Container
from kvlocal.nexus.base import base_hash
from kvlocal.nexus.file import NexusFile
from kvlocal.training.checkpoint import TrainingError, warm_up_then_cosine
from kvlocal.training.decoder import Decoder
from kvlocal.training.distil import Compression, Distillation
from kvlocal.training.divergence import divergences
from kvlocal.training.examples import Example, Examples, joined
from kvlocal.training.parameters import Parameters
from kvlocal.training.training_run import Report, TrainingRun
from kvlocal.training.weights import Weights

EVALUATED_RATIOS = (0.5, 0.8, 0.9)

_TABLE_RATE, _ADAPTER_RATE = 3e-3, 1e-3
# so often one segment of a conversation is cut in two, neither of them shorter than so many tokens
_CUT, _SHORTEST_PART = 0.2, 16
# of a recital, beside the KL of a conversation, which is some five times smaller
_RECITAL_WEIGHT = 0.5
# the ratio at which recitals are evaluated
_RECITED_RATIO = 0.8


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that the result depends on, besides model, data and hardware.

    steps: updates
    batch: conversations an update
    students: compressions of each of them
    k: rows of the embedding table
    rank: of the adapter; 0 trains embeddings alone
    ratios: compression ratios that conversations are trained with
    attention_weight: of the attention term beside KL; 0 leaves it out
    max_tokens: tokens of a conversation at most
    join: up to so many conversations are joined into one, as far as max_tokens allows
    recite: share of the conversations that end with one of their segments once more, word for word, which are judged there
    n_held_out: conversations that are evaluated at most
    seed: of everything random
    start: SHA-256 of the Nexus file whose values training begins with; empty for random ones
    dtype: that matrices are multiplied in, "float32" or "bfloat16"
    """

    steps: int = 600
    batch: int = 4
    students: int = 2
    k: int = 64
    rank: int = 16
    ratios: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    attention_weight: float = 1.0
    max_tokens: int = 1024
    join: int = 2
    recite: float = 0.5
    n_held_out: int = 16
    seed: int = 0
    start: str = ""
    dtype: str = "float32"


@dataclass(frozen=True)
class TrainingReport(Report):
    """One update, or one evaluation, whose means are KL by what was kept, such as "nexus@0.8", in nats per token.

    kl, attention: of an update, mean over its conversations; kl without recitals, and not a number where there were only such
    recital: of an update, mean KL of its recitals; not a number where there were none
    """

    kl: float = math.nan
    attention: float = math.nan
    recital: float = math.nan


class Training(TrainingRun[TrainingReport, NexusFile]):
    """One training run.

    Args:
        base: the model, the very file that is used later.
        base_name: what users call it.
        examples: conversations.
        settings: see TrainingSettings.
        path: the Nexus file, see TrainingRun.
        device: where to compute, such as "cpu" or "cuda".
        start: the Nexus file whose values training begins with.

    Raises:
        TrainingError: there is a checkpoint of a run with other settings, or the file to begin with has another K or rank.
        WeightsError: the model is not one that the decoder knows.
    """

    # tokens that mean nothing yet are worth nothing
    begins_with_evaluation = False

    def __init__(
        self, base: Container, base_name: str, examples: Examples, settings: TrainingSettings, path: Path, device: str, start: NexusFile | None = None
    ) -> None:
        self._base_name, self._examples, self._settings, self._base_hash = base_name, examples, settings, base_hash(base)
        self._decoder = Decoder(Weights.load(base, getattr(torch, settings.dtype), device))
        self._held_out = joined(examples.held_out[: settings.n_held_out], settings.join, settings.max_tokens)
        if start:
            if (start.k, start.rank) != (settings.k, settings.rank):
                raise TrainingError(f"the file to begin with has {start.k} embeddings and rank {start.rank}: ask for the same with --k and --rank")
            self._parameters = Parameters.of(start, self._decoder.device)
        else:
            self._parameters = Parameters.new(self._decoder.weights, settings.k, settings.rank, settings.seed)
        groups = [{"params": [self._parameters.table], "lr": _TABLE_RATE}, {"params": self._parameters.adapter_leaves, "lr": _ADAPTER_RATE}]
        optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(warm_up_then_cosine, steps=settings.steps))
        described = ["nexus", asdict(settings), self._base_hash, examples.digests]
        super().__init__(path, described, self._parameters.leaves, optimiser, schedule, settings.steps)

    def file(self) -> NexusFile:
        """What is trained so far; the adapter in float16."""
        examples = self._examples
        data = {"sha256": examples.digests, "dialogues": examples.n_dialogues, "training": len(examples.training),
                "held_out": len(examples.held_out), "left_out": examples.left_out}  # fmt: skip
        return NexusFile(
            table=self._parameters.table.detach().cpu().numpy().copy(),
            adapter=self._parameters.arrays(),
            alpha=self._parameters.alpha,
            architecture=self._decoder.hyper.family,
            base_name=self._base_name,
            base_hash=self._base_hash,
            ratios=self._settings.ratios,
            record=self._record(asdict(self._settings), data, self._decoder.device) | {"losses": _curve(self.updates)},
        )

    def _gradients(self) -> tuple[tuple[float, float, float], dict[str, Any]]:
        """Of the mean loss of a batch's students."""
        settings = self._settings
        kls: dict[bool, list[float]] = {False: [], True: []}
        attentions = []
        for i in range(settings.batch):
            n = self.step * settings.batch + i
            rng = np.random.default_rng([settings.seed, 1, n])
            example = self._example(n, rng)
            is_recital = bool(rng.random() < settings.recite)
            if is_recital:
                example = self._recital(example, rng)
            # a recital comes behind all that is gone
            n_gone = len(example.segments) - 1 if is_recital else None
            weight = _RECITAL_WEIGHT if is_recital else 1.0
            compressions = [Compression.sample(rng, example, settings.ratios, settings.k, n_gone) for _ in range(settings.students)]
            gone = [compression.n_gone for compression in compressions]
            reading = Distillation(self._decoder, example, n_gone=gone, with_masses=settings.attention_weight > 0)
            for compression in compressions:
                loss = reading.loss(self._parameters, compression, rng)
                ((weight * loss.kl + settings.attention_weight * loss.attention) / (settings.batch * settings.students)).backward()
                kls[is_recital].append(loss.kl.item())
                attentions.append(loss.attention.item())
        kl, recital, attention = (sum(values) / len(values) if values else math.nan for values in (kls[False], kls[True], attentions))
        return (kl, attention, recital), {"kl": kl, "attention": attention, "recital": recital}

    def _example(self, n: int, rng: np.random.Generator) -> Example:
        """The n-th conversation, all of them in a new order in each round, behind others that are drawn; sometimes with a segment cut in two."""
        training = self._examples.training
        order = np.random.default_rng([self._settings.seed, 2, n // len(training)]).permutation(len(training))
        example = training[order[n % len(training)]]
        for i in rng.integers(0, len(training), rng.integers(0, self._settings.join)):
            example = example.behind(training[i], self._settings.max_tokens)
        segment = int(rng.integers(len(example.segments)))
        n = len(example.segments[segment])
        if rng.random() < _CUT and n >= 2 * _SHORTEST_PART:
            example = example.cut(segment, int(rng.integers(_SHORTEST_PART, n - _SHORTEST_PART + 1)))
        return example

    def _recital(self, example: Example, rng: np.random.Generator) -> Example:
        """The conversation up to one of its segments, and then one of those that came, again."""
        n = int(rng.integers(1, len(example.segments) + 1))
        return example.recited(n, int(rng.integers(n)), self._examples.instruction)

    def _held_out_means(self) -> dict[str, float]:
        found = [self._divergences(example) for example in self._held_out]
        return {name: float(np.mean([one[name] for one in found])) for name in (found[0] if found else ())}

    def _divergences(self, example: Example) -> dict[str, float]:
        found = divergences(self._decoder, self._parameters, example, EVALUATED_RATIOS)
        if self._settings.recite:
            n = len(example.segments)
            recited = divergences(self._decoder, self._parameters, example.recited(n, n // 2, self._examples.instruction), (_RECITED_RATIO,))
            found |= {f"recital {name}": value for name, value in recited.items()}
        return found

    def _report(self, step: int, **told: Any) -> TrainingReport:
        return TrainingReport(step, **told)


def _curve(losses: Sequence[tuple[float, float, float]], n: int = 100) -> list[dict[str, float]]:
    """Means of at most n stretches of updates, with the last update of each; what was not measured in one is left out there."""
    found = []
    for part in np.array_split(np.arange(len(losses)), min(n, len(losses))) if losses else ():
        values = np.array([losses[i] for i in part])
        measured = {name: column[~np.isnan(column)] for name, column in zip(("kl", "attention", "recital"), values.T, strict=True)}
        found.append({"step": int(part[-1]) + 1} | {name: round(float(column.mean()), 5) for name, column in measured.items() if len(column)})
    return found
