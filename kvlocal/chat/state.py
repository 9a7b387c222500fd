"""What a conversation needs besides its cache to go on as if it had never ended, among the arrays of a snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvlocal.cache.noted_cells import Arrays, Limits


class Mark(NamedTuple):
    """Where the conversation stood before the last user turn, to go back to.

    n_tokens, n_messages: how long it was
    recent: tokens the repeat penalty looked at
    """

    n_tokens: int
    n_messages: int
    recent: Sequence[int]


class SessionState(NamedTuple):
    """n_answers: answers so far; recent: tokens the repeat penalty looks at; mark: None where the last turn cannot be taken back at once."""

    n_answers: int
    recent: Sequence[int]
    mark: Mark | None


def with_state(arrays: Arrays, state: SessionState) -> Arrays:
    """The arrays of a cache (BudgetedCache.snapshot) with this besides: a number more in numbers, n_answers, and in checkpoint.numbers, n_messages;
    recent and checkpoint.recent, int32 [n].
    """
    arrays = arrays | {"numbers": np.append(arrays["numbers"], state.n_answers), "recent": np.array(state.recent, np.int32)}
    if state.mark and "checkpoint.numbers" in arrays:
        arrays["checkpoint.numbers"] = np.append(arrays["checkpoint.numbers"], state.mark.n_messages)
        arrays["checkpoint.recent"] = np.array(state.mark.recent, np.int32)
    return arrays


def without_state(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[Arrays, SessionState]:
    """What `with_state` was given.

    Raises:
        LookupError, TypeError, ValueError: it gave something else.
    """
    *numbers, n_answers = arrays["numbers"].tolist()
    of_cache = {**arrays, "numbers": np.array(numbers, np.int64)}
    mark = None
    if "checkpoint.numbers" in arrays:
        n_tokens, n_messages = arrays["checkpoint.numbers"].tolist()
        mark = Mark(n_tokens, n_messages, arrays["checkpoint.recent"].tolist())
        of_cache["checkpoint.numbers"] = np.array([n_tokens], np.int64)
    return of_cache, SessionState(n_answers, arrays["recent"].tolist(), mark)


def limits(of_cache: Limits, n_recent: int) -> Limits:
    """The type and the largest shape of each array; of_cache: BudgetedCache.snapshot_limits, n_recent: tokens the repeat penalty looks at at most."""
    recent = ("<i4", (n_recent,))
    return of_cache | {"numbers": ("<i8", (4,)), "checkpoint.numbers": ("<i8", (2,)), "recent": recent, "checkpoint.recent": recent}
