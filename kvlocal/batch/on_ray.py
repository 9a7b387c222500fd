"""OnRay: the lines of a batch answered by workers on an existing Ray cluster. Needs the extra "ray"."""

from __future__ import annotations

import pickle
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Self

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayError, RayTaskError

import kvlocal
from kvlocal.batch.line import Failure, Line, LineError, Outcome
from kvlocal.batch.ray_actor import worker_class
from kvlocal.batch.ray_cluster import Connection, Share, share_out
from kvlocal.batch.ray_worker import Job, LoadedModel
from kvlocal.batch.workplace import Taken
from kvlocal.errors import KvlocalError

# lines that a worker has beyond its streams: the next one begins while the result of the last is on its way
_AHEAD = 1
# a line that so many workers ended with is given up, because it may be why
_TRIES = 5
_RETRY_SECONDS = 0.5  # before a worker that Ray starts again is asked once more
_PATIENCE = 10.0  # seconds without any worker before it is said why nothing happens


@dataclass(eq=False)
class _Worker:
    """An actor.

    machine: where it is, as far as that is known
    ready: whether it has its model
    asked_again: when it may be asked again whether it is ready; None while it is being asked
    n_lines: how many lines it has
    """

    actor: Any
    machine: str = "a worker"
    ready: bool = False
    asked_again: float | None = 0.0
    n_lines: int = 0


class OnRay:
    """A workplace (kvlocal.batch.workplace) whose lines go to workers as they have room; a context manager.

    A worker is an actor that holds a model and its streams. One that ends is started again by Ray, on any machine that has room, and its lines are
    answered anew, by others if they have room first. Every line has one call at a time, so that no result comes twice.

    address: of the cluster (kvlocal.batch.ray_cluster.Connection)
    load: as for kvlocal.batch.ray_worker.Job; it is pickled
    parallel: how many conversations decode together in each worker
    n_workers: None for one on each machine, or on each GPU if they are used
    n_threads: threads of each worker; None for an equal part of a machine's
    use_gpu: whether each worker gets a GPU, if the cluster has any
    tell: gets sentences that a person should read, while the batch goes on
    poll: called while the first worker is waited for; an exception from it ends that
    settings: their key, of the first worker (kvlocal.batch.output)
    has_template: whether the model has a chat template of its own

    Raises:
        KvlocalError: there is no such cluster, or what a worker needs is not on its machine.
    """

    n_threads = 1  # that reads the lines

    def __init__(
        self,
        address: str,
        load: Callable[[int], AbstractContextManager[LoadedModel]],
        *,
        parallel: int = 1,
        n_workers: int | None = None,
        n_threads: int | None = None,
        use_gpu: bool = True,
        tell: Callable[[str], None] = lambda text: None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self._tell, self._parallel = tell, parallel
        self._finish: Callable[[Taken, Outcome], None] = lambda taken, outcome: None
        # read, and given to no worker
        self._read: SimpleQueue[Taken] = SimpleQueue()
        # of workers that ended
        self._again: deque[Taken] = deque()
        self._n_ended: Counter[int] = Counter()
        self._n_answered = 0
        # what a worker does now: a line, or None where it begins
        self._calls: dict[Any, tuple[_Worker, Taken | None]] = {}
        self._workers: list[_Worker] = []
        self.settings, self.has_template = "", True
        self._connection = Connection(address)
        try:
            share = share_out(ray.nodes(), n_workers, n_threads, use_gpu)
            self.n_lines = share.n_workers * (parallel + _AHEAD)
            self._job = pickle.dumps(Job(load, share.n_threads, parallel))
            self._workers = [_Worker(self._actor(share)) for _ in range(share.n_workers)]
            self._wait_for_one(share, poll)
        except BaseException:
            self.close()
            raise

    def _actor(self, share: Share) -> Any:
        actor: Any = ray.remote(worker_class())
        return actor.options(
            num_cpus=share.n_threads,
            num_gpus=share.n_gpus,
            max_restarts=-1,
            max_concurrency=self._parallel + _AHEAD + 1,
            scheduling_strategy="SPREAD",
        ).remote()

    def _wait_for_one(self, share: Share, poll: Callable[[], None]) -> None:
        since, told = time.monotonic(), False
        while not self.settings:
            poll()
            self.advance(0.1)
            if not told and time.monotonic() - since > _PATIENCE:
                self._tell(f"waiting for the first worker: it loads the model, or nothing on the cluster has {share} free for it yet")
                told = True

    def work(self, take: Callable[[], Taken | None], finish: Callable[[Taken, Outcome], None]) -> None:
        """Reads lines until there are none; `advance` answers them."""
        self._finish = finish
        while taken := take():
            self._read.put(taken)

    def advance(self, seconds: float) -> None:
        """Gives lines to workers that have room, and waits for what comes back.

        Raises:
            KvlocalError: the last worker is gone or the cluster is, or a machine cannot have a worker and nothing has been answered yet.
        """
        self._connection.check()
        self._ask_again()
        self._hand_out()
        try:
            if not self._calls:
                self._wait_for_a_line(seconds)
                return
            calls = list(self._calls)
            done, _ = ray.wait(calls, num_returns=1, timeout=seconds)
            if done:
                done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        except ConnectionError as error:
            raise self._connection.lost() from error
        for call in done:
            self._settle(call)

    def _wait_for_a_line(self, seconds: float) -> None:
        with suppress(Empty):
            self._again.append(self._read.get(timeout=seconds))

    def _ask_again(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if not worker.ready and worker.asked_again is not None and worker.asked_again <= now:
                worker.asked_again = None
                self._calls[worker.actor.begin.remote(kvlocal.__version__, self._job)] = worker, None

    def _hand_out(self) -> None:
        """The next lines, each to the worker with the most room."""
        while self._again or not self._read.empty():
            ready = [worker for worker in self._workers if worker.ready and worker.n_lines < self._parallel + _AHEAD]
            if not ready:
                return
            worker = min(ready, key=lambda worker: worker.n_lines)
            taken = self._again.popleft() if self._again else self._read.get()
            worker.n_lines += 1
            self._calls[worker.actor.answer.remote(taken.number, taken.line)] = worker, taken

    def _settle(self, call: Any) -> None:
        """What came back of a call."""
        worker, taken = self._calls.pop(call)
        if taken is None:
            # until it is known to be ready, and again some time later if it is not
            worker.asked_again = time.monotonic() + _RETRY_SECONDS
        else:
            worker.n_lines -= 1
        try:
            answer = ray.get(call)
        except RayTaskError:
            # what the worker itself has raised, which would end a batch in this process too
            raise
        except RayError as error:
            self._ended(worker, taken, error)
            return
        if taken is None:
            self._begun(worker, answer)
        elif answer is None:
            # a new process in the place of one that ended
            worker.ready = False
            self._again.append(taken)
        else:
            self._n_answered += 1
            self._n_ended.pop(taken.number, None)
            self._finish(taken, answer)

    def _begun(self, worker: _Worker, answer: dict[str, Any]) -> None:
        worker.machine = answer["machine"]
        error = answer.get("error")
        if not error and self.settings not in ("", answer["settings"]):
            error = "the model, its adapters or its Nexus tokens are other files there than where the first worker is: put the same on both"
        if error:
            self._refused(worker, f"no worker can be on {worker.machine}: {error}")
            return
        self.settings, self.has_template = answer["settings"], answer["has_template"]
        worker.ready = True

    def _ended(self, worker: _Worker, taken: Taken | None, error: RayError) -> None:
        """A worker has ended, or cannot be reached."""
        if worker.ready:
            self._tell(f"a worker on {worker.machine} has ended: its lines are answered anew")
            worker.ready = False
        if taken:
            self._try_again(taken)
        if isinstance(error, (ActorDiedError, ActorUnschedulableError)) and worker in self._workers:
            # for good, where Ray starts no other one
            self._refused(worker, f"Ray has lost a worker on {worker.machine}: look into its logs, and run the same command again to go on")

    def _try_again(self, taken: Taken) -> None:
        self._n_ended[taken.number] += 1
        if self._n_ended[taken.number] < _TRIES:
            self._again.append(taken)
            return
        try:
            identity = Line.parse(taken.number, taken.line).id
        except LineError as error:
            identity = error.id
        reason = f"{_TRIES} workers ended while they had it: look into Ray's logs for why, and try it again with --retry"
        self._finish(taken, Failure(taken.number, identity, KvlocalError(reason)))

    def _refused(self, worker: _Worker, sentence: str) -> None:
        """Goes on without a worker, where something was answered already and others are left."""
        self._workers.remove(worker)
        ray.kill(worker.actor)
        if not self._n_answered or not self._workers:
            raise KvlocalError(sentence)
        self._tell(sentence)

    def close(self) -> None:
        """Ends the workers; closing twice is harmless."""
        workers, self._workers = self._workers, []
        self._connection.close([worker.actor for worker in workers])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
