"""What a conversation needs besides its cache to go on as if it had never ended, among the arrays of a snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvlocal.cache.noted_cells import Arrays, Limits


class Mark(NamedTuple):
    """Where the conversation stood before a user turn, to go back to.

    n_tokens, n_messages: how long it was
    recent: tokens the repeat penalty looked at
    """

    n_tokens: int
    n_messages: int
    recent: Sequence[int]


class SessionState(NamedTuple):
    """n_answers: answers so far; recent: tokens the repeat penalty looks at; marks: of the turns that can be taken back at once."""

    n_answers: int
    recent: Sequence[int]
    marks: Sequence[Mark]


def with_state(arrays: Arrays, state: SessionState) -> Arrays:
    """The arrays of a cache (BudgetedCache.snapshot) with this besides: a number more in numbers, n_answers; recent, int32 [n]; marks.numbers, int64
    [2, n_marks], n_tokens and n_messages; marks.recent, int32 [n_marks * n], and marks.n_recent, int64 [n_marks], how many each has of them.
    """
    marks = [(mark.n_tokens, mark.n_messages) for mark in state.marks]
    return arrays | {
        "numbers": np.append(arrays["numbers"], state.n_answers),
        "recent": np.array(state.recent, np.int32),
        "marks.numbers": np.array(marks, np.int64).reshape(-1, 2).T,
        "marks.recent": np.array([token for mark in state.marks for token in mark.recent], np.int32),
        "marks.n_recent": np.array([len(mark.recent) for mark in state.marks], np.int64),
    }


def without_state(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[Arrays, SessionState]:
    """What `with_state` was given.

    Raises:
        LookupError, TypeError, ValueError: it gave something else.
    """
    *numbers, n_answers = arrays["numbers"].tolist()
    of_cache = {**arrays, "numbers": np.array(numbers, np.int64)}
    n_recent, recent = arrays["marks.n_recent"], arrays["marks.recent"]
    if (n_recent < 0).any() or n_recent.sum() != len(recent):
        raise ValueError("the marks contradict each other")
    each = np.split(recent, np.cumsum(n_recent)[:-1]) if len(n_recent) else []
    marks = [
        Mark(n_tokens, n_messages, tokens.tolist()) for (n_tokens, n_messages), tokens in zip(arrays["marks.numbers"].T.tolist(), each, strict=True)
    ]
    return of_cache, SessionState(n_answers, arrays["recent"].tolist(), marks)


def limits(of_cache: Limits, n_recent: int, n_text: int) -> Limits:
    """The type and the largest shape of each array; of_cache: BudgetedCache.snapshot_limits, n_recent: tokens the repeat penalty looks at at most."""
    return of_cache | {
        "numbers": ("<i8", (4,)),
        "recent": ("<i4", (n_recent,)),
        "marks.numbers": ("<i8", (2, n_text)),
        "marks.recent": ("<i4", (n_recent * n_text,)),
        "marks.n_recent": ("<i8", (n_text,)),
    }
