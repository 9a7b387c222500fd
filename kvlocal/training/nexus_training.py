"""Trains Nexus tokens by distillation: updates, held-out evaluation, checkpoints that a killed run goes on from."""

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

from kvlocal.gguf.container import Container
from kvlocal.nexus.base import base_hash
from kvlocal.nexus.file import NexusFile
from kvlocal.training.checkpoint import TrainingError, load_checkpoint, save_checkpoint, warm_up_then_cosine
from kvlocal.training.decoder import Decoder
from kvlocal.training.distil import Compression, Distillation
from kvlocal.training.divergence import divergences
from kvlocal.training.examples import Example, Examples, joined
from kvlocal.training.parameters import Parameters
from kvlocal.training.weights import Weights

EVALUATED_RATIOS = (0.5, 0.8, 0.9)

_TABLE_RATE, _ADAPTER_RATE = 3e-3, 1e-3
_CLIP = 1.0
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
class TrainingReport:
    """One update, or one evaluation.

    step: updates made
    kl, attention: of an update, mean over its conversations; kl without recitals, and not a number where there were only such
    recital: of an update, mean KL of its recitals; not a number where there were none
    held_out: of an evaluation, mean KL by what was kept, such as "nexus@0.8", in nats per token; empty for an update
    seconds: spent on it
    """

    step: int
    kl: float = math.nan
    attention: float = math.nan
    recital: float = math.nan
    held_out: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class _State:
    """What a checkpoint holds besides parameters and optimiser; random numbers depend on seed and step alone."""

    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[float, float, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class Training:
    """One training run.

    Args:
        base: the model, the very file that is used later.
        base_name: what users call it.
        examples: conversations.
        settings: see TrainingSettings.
        path: the Nexus file. It is written at every checkpoint; what is needed to go on is beside it, in PATH.partial, until all is done.
        device: where to compute, such as "cpu" or "cuda".
        start: the Nexus file whose values training begins with.

    Raises:
        TrainingError: there is a checkpoint of a run with other settings, or the file to begin with has another K or rank.
        WeightsError: the model is not one that the decoder knows.
    """

    def __init__(
        self, base: Container, base_name: str, examples: Examples, settings: TrainingSettings, path: Path, device: str, start: NexusFile | None = None
    ) -> None:
        self._base, self._base_name, self._examples, self._settings = base, base_name, examples, settings
        self._path, self._checkpoint = path, path.with_name(path.name + ".partial")
        self._base_hash = base_hash(base)
        described = [asdict(settings), self._base_hash, examples.digests]
        self._key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self._decoder = Decoder(Weights.load(base, getattr(torch, settings.dtype), device))
        self._held_out = joined(examples.held_out[: settings.n_held_out], settings.join, settings.max_tokens)
        if start:
            if (start.k, start.rank) != (settings.k, settings.rank):
                raise TrainingError(f"the file to begin with has {start.k} embeddings and rank {start.rank}: ask for the same with --k and --rank")
            self._parameters = Parameters.of(start, self._decoder.device)
        else:
            self._parameters = Parameters.new(self._decoder.weights, settings.k, settings.rank, settings.seed)
        groups = [{"params": [self._parameters.table], "lr": _TABLE_RATE}, {"params": self._parameters.adapter_leaves, "lr": _ADAPTER_RATE}]
        self._optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, partial(warm_up_then_cosine, steps=settings.steps))
        self._state = _State()
        self._stopped = False
        self._resume()

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self._state.step

    def stop(self) -> None:
        """Makes `run` end after the update it is at, as when the time is over. May be called by a signal's handler."""
        self._stopped = True

    def run(
        self,
        report: Callable[[TrainingReport], None],
        *,
        evaluate_every: int = 100,
        checkpoint_seconds: float = 300.0,
        limit_seconds: float = math.inf,
    ) -> NexusFile:
        """Trains to the last update, or until the time is over, and writes the Nexus file.

        Args:
            report: gets every update and every evaluation.
            evaluate_every: updates from one evaluation to the next; one more comes at the end.
            checkpoint_seconds: from one checkpoint to the next.
            limit_seconds: of training in this call; a run that it stops can be gone on with.

        Raises:
            TrainingError: a loss is not finite any more.
        """
        started = saved = time.monotonic()
        steps = self._settings.steps
        while self.step < steps and not self._stopped and time.monotonic() - started < limit_seconds:
            report(self._update())
            if self.step % evaluate_every == 0 and self.step < steps:
                report(self._evaluate())
            if time.monotonic() - saved >= checkpoint_seconds:
                self._save_checkpoint()
                saved = time.monotonic()
        if self.step < steps:
            self._save_checkpoint()
        else:
            report(self._evaluate())
            self.file().save(self._path)
            self._checkpoint.unlink(missing_ok=True)
        return self.file()

    def file(self) -> NexusFile:
        """What is trained so far; the adapter in float16."""
        record = {
            "settings": asdict(self._settings),
            "data": {"sha256": self._examples.digests, "dialogues": self._examples.n_dialogues, "training": len(self._examples.training),
                     "held_out": len(self._examples.held_out), "left_out": self._examples.left_out},
            "torch": torch.__version__,
            "device": self._decoder.device.type,
            "seconds": round(self._state.seconds, 1),
            "steps": self.step,
            "losses": _curve(self._state.losses),
            "evaluations": self._state.evaluations,
        }  # fmt: skip
        return NexusFile(
            table=self._parameters.table.detach().cpu().numpy().copy(),
            adapter=self._parameters.arrays(),
            alpha=self._parameters.alpha,
            architecture=self._decoder.hyper.family,
            base_name=self._base_name,
            base_hash=self._base_hash,
            ratios=self._settings.ratios,
            record=record,
        )

    def _update(self) -> TrainingReport:
        """One step of AdamW on the mean loss of a batch's students."""
        started = time.monotonic()
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
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.leaves, _CLIP)
        if not torch.isfinite(norm):
            raise TrainingError(f"the loss is not finite any more after {self.step} updates: start anew with another --seed or --dtype float32")
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()
        state = self._state
        state.step += 1
        kl, recital, attention = (sum(values) / len(values) if values else math.nan for values in (kls[False], kls[True], attentions))
        state.losses.append((kl, attention, recital))
        seconds = time.monotonic() - started
        state.seconds += seconds
        return TrainingReport(self.step, kl, attention, recital, seconds=seconds)

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

    def _evaluate(self) -> TrainingReport:
        started = time.monotonic()
        found = [self._divergences(example) for example in self._held_out]
        means = {name: float(np.mean([one[name] for one in found])) for name in (found[0] if found else ())}
        if means:
            self._state.evaluations.append({"step": self.step} | {name: round(value, 5) for name, value in means.items()})
        return TrainingReport(self.step, held_out=means, seconds=time.monotonic() - started)

    def _divergences(self, example: Example) -> dict[str, float]:
        found = divergences(self._decoder, self._parameters, example, EVALUATED_RATIOS)
        if self._settings.recite:
            n = len(example.segments)
            recited = divergences(self._decoder, self._parameters, example.recited(n, n // 2, self._examples.instruction), (_RECITED_RATIO,))
            found |= {f"recital {name}": value for name, value in recited.items()}
        return found

    def _save_checkpoint(self) -> None:
        """Writes what the run goes on from, and the Nexus file as it is now."""
        save_checkpoint(self._checkpoint, self._key, self._parameters.leaves, self._optimiser, self._schedule, asdict(self._state))
        self.file().save(self._path)

    def _resume(self) -> None:
        state = load_checkpoint(self._checkpoint, self._key, self._parameters.leaves, self._optimiser, self._schedule)
        if state is not None:
            self._state = _State(**state)


def _curve(losses: Sequence[tuple[float, float, float]], n: int = 100) -> list[dict[str, float]]:
    """Means of at most n stretches of updates, with the last update of each; what was not measured in one is left out there."""
    found = []
    for part in np.array_split(np.arange(len(losses)), min(n, len(losses))) if losses else ():
        values = np.array([losses[i] for i in part])
        measured = {name: column[~np.isnan(column)] for name, column in zip(("kl", "attention", "recital"), values.T, strict=True)}
        found.append({"step": int(part[-1]) + 1} | {name: round(float(column.mean()), 5) for name, column in measured.items() if len(column)})
    return found
