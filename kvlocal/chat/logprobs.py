"""Log-probabilities of tokens in OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvlocal.chat.answer_piece import TokenLogprob

_LEAST_LOGPROB = -9999.0  # OpenAI's for a token that cannot come; JSON has no infinity


def logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities of tokens and of those that could have stood in their places."""
    return [
        {**_chance(token.token, token.logprob), "top_logprobs": [_chance(other, logprob) for other, logprob in token.top]} for token in tokens
    ]


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def _chance(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(token)}
