"""`kvlocal adapt eval --tasks`: how often a model answers tasks rightly, without an adapter and with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from kvlocal import policies
from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.statistics import mean_over_chats, shown
from kvlocal.llama.adapter import Lora
from kvlocal.llama.context import MAX_SEQUENCES
from kvlocal.llama.model import Model
from kvlocal_cli.adapt_rl import MADE_TASKS
from kvlocal_cli.option_lists import add_options
from kvlocal_cli.progress import LongWork

if TYPE_CHECKING:
    from kvlocal.training.tasks import CheckedTask

OWN = "own"
FULL = "full"
_ALL = "all tasks"
# with what tasks are told apart from those that training evaluates with
_SEED = 1

# by student, such as "gkv@0.8", and whether with the adapter: the mean reward of each task
Rewards = Mapping[tuple[str, bool], np.ndarray]

_OPTIONS = (
    click.option("--tasks", "tasks", metavar="FILE.jsonl|own",
                 help='Measure how often answers are right instead: to tasks as `adapt rl` has them, or with "own" to tasks that it makes and does '
                      "not train on."),
    *MADE_TASKS,
    click.option("--answers", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Answers to each task."),
    click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, metavar="X",
                 help="Temperature that they are drawn at; with 0 one answer is enough."),
    click.option("--answer-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="Tokens of an answer at most."),
    click.option("--parallel", type=click.IntRange(1, MAX_SEQUENCES), default=16, show_default=True, metavar="N", help="Answers drawn at a time."),
)  # fmt: skip


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of an evaluation by tasks."""
    return add_options(command, _OPTIONS)


def tasks_of(name: str, kinds: Sequence[str], task_tokens: tuple[int, int], limit: int) -> "Sequence[CheckedTask]":
    """At most so many tasks, of a file or made ones.

    Raises:
        KvlocalError: the file cannot be used.
    """
    from kvlocal.training.task_maker import make_tasks
    from kvlocal.training.tasks import read_tasks

    if name == OWN:
        return make_tasks(limit, _SEED, "held_out", task_tokens, kinds)
    return read_tasks(Path(name)).tasks[:limit]


def measure_rewards(
    path: Path, file: Path, tasks: "Sequence[CheckedTask]", students: Mapping[str, SessionConfig], *, answers: int, temperature: float,
    answer_tokens: int, parallel: int,
) -> Rewards:
    """Answers tasks without the adapter and with it, with the same random numbers.

    students: how the cache is kept, by name; they get the cells that the tasks need
    """
    from kvlocal.training.rewards import cells_for, rewards
    from kvlocal.training.rollouts import Rollouts

    found: dict[tuple[str, bool], np.ndarray] = {}
    with LongWork("tasks", 2 * len(students) * len(tasks)) as work:
        for with_it in (False, True):
            with Model(path, lora=[Lora(file)] if with_it else []) as model:
                n_cells = cells_for(model, tasks, answer_tokens, max(config.stride for config in students.values()))
                for name, config in students.items():
                    with Rollouts(
                        model, replace(config, budget=n_cells), parallel=parallel, temperature=temperature, max_tokens=answer_tokens
                    ) as rollouts:
                        found[name, with_it] = rewards(rollouts, tasks, _SEED, answers, _reporter(work, len(found) * len(tasks)))
                    if not work.with_bar:
                        work.say(f"{name}{' with the adapter' if with_it else ''}: reward {found[name, with_it].mean():.3f}")
    return found


def _reporter(work: LongWork, before: int) -> Callable[[int], None]:
    def report(n: int) -> None:
        work.update(completed=before + n)
        if not work.with_bar and work.is_time(60):
            work.say(f"{before + n} tasks answered")

    return report


def students_of(names: Sequence[str], ratios: Sequence[float], stride: int, n_threads: int) -> dict[str, SessionConfig]:
    """How the cache is kept, by name: uncompressed, and by each policy at each ratio.

    Raises:
        KvlocalError: a policy cannot be measured so.
    """
    always: dict[str, Any] = {"archive": "off", "idle": False, "n_threads": n_threads}
    found = {FULL: SessionConfig(policy="full", **always)}
    for name in names:
        if policies.make(name).needs & {"nexus", "reread"} or name == "recall":
            raise KvlocalError(f"the policy {name} cannot be measured on tasks: choose one without an archive, a second read and Nexus tokens")
        found |= {f"{name}@{ratio:g}": SessionConfig(policy=name, ratio=ratio, stride=stride, read_stride=stride, **always) for ratio in ratios}
    return found


def rows_of(found: Rewards, tasks: "Sequence[CheckedTask]") -> list[dict[str, Any]]:
    """Mean rewards with 95 % intervals over tasks, and the differences that the adapter makes."""
    kinds = np.array([task.kind for task in tasks])
    groups = {_ALL: np.ones(len(tasks), bool)} | ({kind: kinds == kind for kind in sorted(set(kinds))} if len(set(kinds)) > 1 else {})
    rows = []
    for student in dict.fromkeys(student for student, _ in found):
        for kind, chosen in groups.items():
            without, with_it = found[student, False][chosen], found[student, True][chosen]
            for what, values in (("without", without), ("with", with_it), ("difference", with_it - without)):
                mean, lo, hi = mean_over_chats(values, np.ones(len(values)))
                rows.append({"student": student, "kind": kind, "adapter": what, "mean": mean, "lo": lo, "hi": hi, "n": len(values)})
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of rows_of."""
    click.echo(f"{'cells':<14}{'kind':<14}{'without':<24}{'with the adapter':<24}difference")
    for i in range(0, len(rows), 3):
        texts = [shown(row["mean"], row["lo"], row["hi"]) for row in rows[i : i + 3]]
        click.echo(f"{rows[i]['student']:<14}{rows[i]['kind']:<14}{texts[0]:<24}{texts[1]:<24}{texts[2]}")
