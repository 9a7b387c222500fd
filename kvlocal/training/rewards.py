"""How often a model answers tasks rightly, with compression and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KvlocalError
from kvlocal.llama.context import CELL_BLOCK
from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.training.rollouts import Rollouts
from kvlocal.training.tasks import CheckedTask


def rewards(
    rollouts: Rollouts, tasks: Sequence[CheckedTask], seed: int, n_answers: int, progress: Callable[[int], None] = lambda n: None
) -> npt.NDArray[np.float64]:
    """Mean reward of the answers to each task, [n_tasks]; the random numbers of a task depend on the seed and its place alone.

    progress: called with the number of tasks that are done
    """
    found: list[float] = []
    n = max(1, rollouts.parallel // n_answers)
    for start in range(0, len(tasks), n):
        some = tasks[start : start + n]
        groups = rollouts.groups(some, [[seed, 4, start + i] for i in range(len(some))], n_answers)
        found += [float(group.rewards.mean()) for group in groups]
        progress(len(found))
    return np.array(found)


def cells_for(model: Model, tasks: Sequence[CheckedTask], max_tokens: int, stride: int) -> int:
    """Cells in which the longest of these conversations has room, with an answer of so many tokens; a cache has `stride` cells besides.

    Raises:
        KvlocalError: the model was not trained for one of them, or its template refuses one.
    """
    template = ChatTemplate.from_model(model)
    lengths = [len(model.tokenize(template.render(task.messages, opening=True), parse_special=True)) for task in tasks]
    longest = max(lengths) + max_tokens
    most = model.n_ctx_train - stride
    if longest >= most:
        raise KvlocalError(
            f"task {lengths.index(max(lengths)) + 1} has {max(lengths)} tokens, which leaves too few of the {model.n_ctx_train} positions that the "
            "model was trained on: shorten it"
        )
    return min(most, -(-(longest + 1) // CELL_BLOCK) * CELL_BLOCK)
