"""What commands that need PyTorch have in common: where and how to compute, and how they stop."""

import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import click

from kvlocal.errors import KvlocalError
from kvlocal_cli.option_lists import add_options

_OPTIONS = (
    click.option("--device", metavar="NAME", help="cpu or cuda.  [default: cuda if there is one]"),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]),
                 help="What matrices are multiplied in.  [default: bfloat16 where the hardware has it]"),
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads.  [default: one per core]"),
)  # fmt: skip


class Stoppable(Protocol):
    def stop(self) -> None: ...


def compute_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --device, --dtype and --threads; the command gets the first two as PyTorch names them."""

    @functools.wraps(command)
    def with_device(*, device: str | None, dtype: str | None, threads: int | None, **others: Any) -> Any:
        try:
            import torch
        except ImportError as error:
            raise KvlocalError("training and its evaluation need PyTorch: install it with `pip install kvlocal[train]`") from error
        from kvlocal.training import hardware

        if threads:
            torch.set_num_threads(threads)
        device = device or hardware.best_device()
        return command(device=device, dtype=dtype or hardware.best_dtype(device), **others)

    return add_options(with_device, _OPTIONS)


@contextmanager
def stops(run: Stoppable) -> Iterator[list[int]]:
    """Ctrl-C in this block ends the run after the update it is at; a second one ends it at once. The list gets what came."""
    came: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, previous)
        run.stop()
        say("stopping after this update")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, previous)


def say(text: str) -> None:
    """A line on stderr."""
    click.echo(f"kvlocal: {text}", err=True)
