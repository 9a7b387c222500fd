"""What a worker on a Ray cluster does: it holds a model and its streams, and answers the lines of a batch that it is given."""

from __future__ import annotations

import os
import pickle
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

from kvlocal.batch.in_process import InProcess
from kvlocal.batch.line import Failure, Outcome
from kvlocal.batch.output import settings_key
from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.chat_template import ChatTemplate


class LoadedModel(Protocol):
    """A model, how conversations with it are kept, and the Nexus tokens that go with it, if the policy uses some."""

    @property
    def model(self) -> Model: ...
    @property
    def config(self) -> SessionConfig: ...
    @property
    def nexus(self) -> NexusTokens | None: ...


@dataclass(frozen=True)
class Job:
    """What a worker is to do; it is pickled.

    load: gives the model with so many threads, for as long as it is used
    n_threads: of the worker
    parallel: how many conversations decode together in it
    """

    load: Callable[[int], AbstractContextManager[LoadedModel]]
    n_threads: int
    parallel: int


class Streams:
    """A model and its streams in this process, in which any thread may have a line answered.

    settings: their key (kvlocal.batch.output)
    has_template: whether the model has a chat template of its own

    Raises:
        KvlocalError: the model is not there, or no session is possible with it.
    """

    def __init__(self, job: Job) -> None:
        with ExitStack() as stack:
            loaded = stack.enter_context(job.load(job.n_threads))
            self.settings = settings_key(loaded.model, loaded.config, loaded.nexus)
            self.has_template = ChatTemplate.from_model(loaded.model).is_own
            self._workplace = InProcess(job.parallel, loaded.model, loaded.config, loaded.nexus)
            self._room = threading.Semaphore(job.parallel)
            # open until the process ends
            self._open = stack.pop_all()
        threading.Thread(target=self._drive, daemon=True).start()

    def answer(self, number: int, line: bytes) -> Outcome:
        """What becomes of a line; waits until a stream is free."""
        with self._room:
            outcome = self._workplace.answer(number, line)
        # an error of another type may be none that can be sent
        return Failure(number, outcome.id, KvlocalError(str(outcome.error))) if isinstance(outcome, Failure) else outcome

    def _drive(self) -> None:
        try:
            while True:
                self._workplace.advance(1.0)
        except BaseException:  # noqa: BLE001 - lines would wait forever for a step
            traceback.print_exc()
            os._exit(1)


def streams_for(job: bytes) -> Streams:
    """The streams of a pickled Job."""
    asked: Job = pickle.loads(job)
    return Streams(asked)
