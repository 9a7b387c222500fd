"""Continuations of texts as OpenAI's completions have them: the log-probabilities of their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvlocal.chat.answer_piece import TokenLogprob
from kvlocal.openai_forms.chat_reply import finite


def completion_logprobs(tokens: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """Of tokens one after another, the first of which begins at the character `offset`; a token that is the first of all has none."""
    texts = [token.token.decode("utf-8", "replace") for token in tokens]
    offsets = [offset]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    given = [None if math.isnan(token.logprob) else token for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token and finite(token.logprob) for token in given],
        "top_logprobs": [token and {other.decode("utf-8", "replace"): finite(logprob) for other, logprob in token.top} for token in given],
        "text_offset": offsets[: len(texts)],
    }
