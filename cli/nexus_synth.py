"""`kvlocal nexus synth`."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any, Self

import click

from kvlocal.chat.config import SessionConfig
from kvlocal.hub.catalogue import resolve
from kvlocal.llama.context import MAX_SEQUENCES
from kvlocal.llama.model import Model
from kvlocal.training.synth import N_CELLS, DataFile, SynthSettings, WrittenDialogue, synthesize
from kvlocal_cli.device_options import device_options, take_devices
from kvlocal_cli.progress import LongWork
from kvlocal_cli.terminal import INTERRUPTED, waiting

_SETTINGS = SynthSettings()


@click.command("synth")
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE",
              help="Where the dialogues go, one JSON object a line.")
@click.option("--tokens", type=click.IntRange(min=1), required=True, metavar="N", help="Stop when the dialogues in FILE have N tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=_SETTINGS.seed, show_default=True, metavar="N",
              help="Seed of everything that is random.")
@click.option("--parallel", type=click.IntRange(1, MAX_SEQUENCES), default=_SETTINGS.parallel, show_default=True, metavar="N",
              help="Dialogues written at a time.")
@device_options
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads.  [default: one per core]")  # fmt: skip
def synth_command(model: str, output: Path, tokens: int, seed: int, parallel: int, threads: int | None, **where: Any) -> None:
    """Let a model write dialogues with itself, to train Nexus tokens on.

    MODEL is a name from the catalogue or a GGUF file. It writes the user's turns and its own answers about seeded topics; the user states
    facts early and asks for them late. Dialogues that go wrong are cut off or left out.

    A line is {"messages": [{"role": ..., "content": ...}, ...], "seed": ..., "tokens": ..., "run": ...}. The same command goes on where it
    was interrupted, and with more --tokens it adds to the file.
    """
    settings = SynthSettings(seed=seed, parallel=parallel, n_threads=threads)
    with waiting(f"loading {model}"):
        path = resolve(model)
        config = SessionConfig(budget=N_CELLS, policy="full", n_ubatch=max(parallel, SessionConfig.window))
        loaded = Model(path, placement=take_devices(where).of(path, config, parallel, undo=False))
    with loaded:
        if not written_dialogues(loaded, output, tokens, settings):
            sys.exit(INTERRUPTED)


def written_dialogues(model: Model, output: Path, n_tokens: int, settings: SynthSettings = _SETTINGS) -> bool:
    """Lets a model write dialogues until a file has so many tokens of them, with progress on stderr; False if Ctrl-C came before.

    Raises KvlocalError if the file holds something else, or cannot be written.
    """
    with DataFile(output, settings.key(model), settings) as data, _Progress(data, n_tokens) as progress:
        try:
            for dialogue in synthesize(model, data, n_tokens, settings):
                progress.add(dialogue)
        except KeyboardInterrupt:
            progress.interrupted = True
    return not progress.interrupted


class _Progress:
    """How full the file is, on stderr: a bar on a terminal, else a line now and then; and a line at the end."""

    def __init__(self, data: DataFile, n_tokens: int) -> None:
        self.interrupted = False
        self._data, self._goal, self._before = data, n_tokens, data.n_tokens
        self._work = LongWork(total=n_tokens, completed=data.n_tokens)
        self._dropped: Counter[str | None] = Counter()
        self._cut = 0

    def __enter__(self) -> Self:
        self._work.__enter__()
        if self._before:
            self._work.say(f"going on after {self._data.n_dialogues} dialogues with {self._before:,} tokens")
        return self

    def add(self, dialogue: WrittenDialogue) -> None:
        if not dialogue.messages:
            self._dropped[dialogue.flaw] += 1
        elif dialogue.flaw:
            self._cut += 1
        self._work.update(completed=self._data.n_tokens, description=self._counts())
        if not self._work.with_bar and self._work.is_time():
            self._work.say(self._counts())

    def _counts(self) -> str:
        speed = (self._data.n_tokens - self._before) / max(self._work.seconds, 1e-9)
        dropped = self._dropped.total()
        return (
            f"{self._data.n_dialogues} dialogues, {self._data.n_tokens:,} of {self._goal:,} tokens, {speed:.0f} tokens/s"
            + (f", {self._cut} cut off" if self._cut else "")
            + (f", {dropped} left out" if dropped else "")
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._work.__exit__()
        if kind is None:
            again = "; the same command goes on from here" if self.interrupted else ""
            self._work.say(f"{'interrupted, ' if self.interrupted else ''}{self._counts()}{again}")
            if self._dropped:
                reasons = ", ".join(f"{reason} {n}" for reason, n in self._dropped.most_common())
                self._work.say(f"left out: {reasons}")
