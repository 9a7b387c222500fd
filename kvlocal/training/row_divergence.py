"""The divergence of a student's predictions from its teacher's, row by row, without the probabilities of all rows at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlocal.training.decoder import Decoder

_CHUNK = 64  # rows whose probabilities over the vocabulary are held at a time


class RowsKL(torch.autograd.Function):
    """KL(teacher || student) over the vocabulary at a temperature, times its square, mean over rows, from hidden rows float32 [n, n_embd].

    At temperature T logits are divided by T; T squared keeps gradients as large as at 1 (Hinton et al., arXiv 1503.02531). The gradient is made on
    the way, chunk by chunk, so the probabilities of all rows are never held together.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, decoder: Decoder, temperature: float = 1.0) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(student), _CHUNK):
            rows = slice(begin, begin + _CHUNK)
            logits = decoder.logits(student[rows]).float()
            expected = F.log_softmax(decoder.logits(teacher[rows]).float() / temperature, -1)
            found = F.log_softmax(logits / temperature, -1)
            p = expected.exp()
            total += expected.sub_(found).mul_(p).sum()
            if gradient is not None:
                d = found.exp_().sub_(p)
                softcap = decoder.hyper.softcap
                if softcap:
                    d *= 1 - (logits / softcap) ** 2
                gradient[rows] = (d.to(decoder.dtype) @ decoder.weights.output).float() * (temperature / len(student))
        ctx.gradient = gradient
        return (total * (temperature**2 / len(student))).float()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.gradient * scale, None, None, None
