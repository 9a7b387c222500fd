"""GRPO (G-KV, arXiv 2512.00504): what a group of answers teaches, over the very cells that each of their tokens saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvlocal.cache.kept_tokens import Change, seen
from kvlocal.training.decoder import Decoder, LowRankAdapter
from kvlocal.training.rollouts import Group
from kvlocal.training.weights import HyperParameters

_LEAST_DEVIATION = 1e-6


def advantages(group: Group) -> npt.NDArray[np.float64]:
    """(r - mean) / std of the rewards of a group, [n_answers]; 0 where all are the same. That of an answer that was cut off is not below 0: it may
    have been on its way to the right one.
    """
    rewards = group.rewards
    deviation = rewards.std()
    if deviation < _LEAST_DEVIATION:
        return np.zeros_like(rewards)
    found = (rewards - rewards.mean()) / deviation
    return np.where([answer.cut for answer in group.answers], np.maximum(found, 0.0), found)


@dataclass(frozen=True)
class Packed:
    """A conversation and all answers to it as one text, in which each answer follows the conversation and sees none of the others.

    tokens, positions: int64 [R], the conversation's, then those of each answer but for its last one
    visible: bool [L, H, R, R], the columns that each row saw in each layer and KV head
    rows: int64 [n], those that predict the n tokens of all answers
    targets: int64 [n], these tokens
    answers: int64 [n], whose they are
    logprobs: float64 [n], as they were when they were drawn
    """

    tokens: Tensor
    positions: Tensor
    visible: Tensor
    rows: Tensor
    targets: Tensor
    answers: Tensor
    logprobs: Tensor

    @classmethod
    def of(cls, group: Group, hyper: HyperParameters) -> Packed:
        """Layers with a sliding window are not compressed, and the decoder knows how far they see."""
        compressed = [i for i, window in enumerate(hyper.windows) if window is None]
        n_prompt = len(group.prompt)
        lengths = [len(answer.tokens) - 1 for answer in group.answers]
        n_rows = n_prompt + sum(lengths)
        visible = np.zeros((hyper.n_layer, hyper.n_head_kv, n_rows, n_rows), np.bool_)

        def fill(changes: list[Change], start: int, end: int, at: int) -> None:
            """Rows at .. of the tokens start .. end - 1 of a conversation of which the columns behind the prompt begin at `at` too."""
            rows = slice(at, at + end - start)
            for layers, known in ((list(range(hyper.n_layer)), []), (compressed, changes)):
                columns = seen(known, start, end, len(layers), hyper.n_head_kv)
                for layer, of_layer in zip(layers, columns, strict=True):
                    visible[layer, :, rows, : min(end, n_prompt)] = of_layer[..., :n_prompt]
                    visible[layer, :, rows, at : at + max(0, end - n_prompt)] = of_layer[..., n_prompt:]

        fill(list(group.changes), 0, n_prompt, 0)
        starts = n_prompt + np.cumsum([0, *lengths])[:-1]
        for answer, length, at in zip(group.answers, lengths, starts.tolist(), strict=True):
            if length:
                fill(list(answer.changes), n_prompt, n_prompt + length, at)
        # an answer's first token is predicted by the conversation's last one
        rows = [np.concatenate([[n_prompt - 1], np.arange(at, at + length)]) for at, length in zip(starts, lengths, strict=True)]
        places = [np.arange(n_prompt), *(np.arange(n_prompt, n_prompt + length) for length in lengths)]
        tokens = [group.prompt, *(answer.tokens[:-1] for answer in group.answers)]
        return cls(
            tokens=_integers(tokens),
            positions=_integers(places),
            visible=torch.from_numpy(visible),
            rows=_integers(rows),
            targets=_integers([answer.tokens for answer in group.answers]),
            answers=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths) + 1),
            logprobs=torch.from_numpy(np.concatenate([answer.logprobs for answer in group.answers])),
        )


def token_logprobs(decoder: Decoder, packed: Packed, adapter: LowRankAdapter | None, temperature: float) -> Tensor:
    """The logarithms of the probabilities of all answers' tokens at a temperature, float32 [n]."""
    device = decoder.device
    x = decoder.embed(packed.tokens.to(device))
    found = decoder.forward(x, packed.positions.to(device), packed.visible.to(device), adapter=adapter)
    logits = decoder.logits(found.hidden[packed.rows.to(device)]).float() / temperature
    return logits.log_softmax(-1).gather(-1, packed.targets.to(device)[:, None])[:, 0]


@dataclass(frozen=True)
class Difference:
    """How far the probabilities of drawn tokens in PyTorch are from those in llama.cpp: |log p - log p'|, over n tokens."""

    largest: float
    mean: float
    n: int


def policy_gradient(
    decoder: Decoder, group: Group, adapter: LowRankAdapter | None, temperature: float, scale: float
) -> Difference:
    """Adds the gradient of -scale * sum of A log p over all tokens of a group's answers, which were drawn by the model as it is (on-policy).

    temperature: that they were drawn at
    """
    packed = Packed.of(group, decoder.hyper)
    found = token_logprobs(decoder, packed, adapter, temperature)
    weights = torch.from_numpy(advantages(group))[packed.answers].to(found)
    (-scale * (weights * found).sum()).backward()
    return difference(found.detach(), packed)


def difference(found: Tensor, packed: Packed) -> Difference:
    """Of log-probabilities that `token_logprobs` gave."""
    apart = (found.double().cpu() - packed.logprobs).abs()
    return Difference(float(apart.max()), float(apart.mean()), len(apart))


def _integers(parts: list[npt.NDArray[np.int32]] | list[npt.NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
