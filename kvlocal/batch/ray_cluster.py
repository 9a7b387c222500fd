"""A Ray cluster: reaching it, noticing that it is gone, and what of each machine a worker gets. Needs the extra "ray"."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from kvlocal.errors import KvlocalError

_REACH_SECONDS = 5.0  # for a connection to the head of the cluster
_CHECK_SECONDS = 5.0  # between two looks at whether it is still there
# Ray ends the process after 60 seconds without its head
_LOST_SECONDS = 25.0


class Connection:
    """The connection of this process to a cluster; one that the program has made before is used, and stays.

    address: HOST:PORT of its head, for a machine that belongs to it, or auto for the one of this machine

    Raises:
        KvlocalError: it cannot be reached, or has other versions of Ray or Python.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._is_ours = not ray.is_initialized()
        self._seen = self._looked = time.monotonic()
        self._is_lost = False
        if self._is_ours:
            self._connect()
        host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
        self._head = host.strip("[]"), int(port)

    def _connect(self) -> None:
        found = re.fullmatch(r"\[?([^/\]]+?)\]?:(\d{1,5})", self._address)
        if not found and self._address != "auto":
            raise KvlocalError(f"{self._address!r} is no address of a Ray cluster: give HOST:PORT, or auto")
        # Ray itself would try for minutes
        if found and not _answers(found[1], int(found[2])):
            raise KvlocalError(f"no Ray cluster answers at {self._address}: start one with `ray start --head`, or give the address that it told")
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # which ones depends on how far it came
            raise KvlocalError(f"the Ray cluster at {self._address} cannot be used: {_sentence(error)}") from error

    def check(self) -> None:
        """Looks now and then whether the head of the cluster is there.

        Raises:
            KvlocalError: it has not been for so long that it will not come back.
        """
        now = time.monotonic()
        if now - self._looked < _CHECK_SECONDS:
            return
        self._looked = now
        if _answers(*self._head, seconds=1.0):
            self._seen = now
        elif now - self._seen > _LOST_SECONDS:
            raise self.lost()

    def lost(self) -> KvlocalError:
        """What to say when it is gone."""
        self._is_lost = True
        return KvlocalError(f"the Ray cluster at {self._address} is gone: run the same command again once it is back; the results so far are there")

    def close(self, actors: Sequence[Any]) -> None:
        """Ends these actors, and the connection if it is ours."""
        if ray.is_initialized() and not self._is_lost:
            for actor in actors:
                ray.kill(actor)
        if self._is_ours:
            ray.shutdown()


def _answers(host: str, port: int, seconds: float = _REACH_SECONDS) -> bool:
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except (OSError, OverflowError):
        return False
    return True


def _sentence(error: Exception) -> str:
    """What an error of Ray says, in one line."""
    return " ".join(str(error).split()).rstrip(".")[:300]


@dataclass(frozen=True)
class Share:
    """What workers get of a cluster.

    n_workers: how many there are
    n_threads, n_gpus: of each
    """

    n_workers: int
    n_threads: int
    n_gpus: int

    def __str__(self) -> str:
        cpus = f"{self.n_threads} {'CPU' if self.n_threads == 1 else 'CPUs'}"
        return f"{cpus} and a GPU" if self.n_gpus else cpus


def share_out(nodes: Sequence[Mapping[str, Any]], n_workers: int | None, n_threads: int | None, use_gpu: bool) -> Share:
    """What each worker gets: a GPU where there are some that may be used, and as many CPUs as all that are on one machine can have alike.

    nodes: as ray.nodes gives them
    n_workers: None for one on each GPU, or else on each machine
    n_threads: None for what is left for each

    Raises:
        KvlocalError: there is no machine that has as much.
    """
    machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not machines:
        raise KvlocalError("the Ray cluster has no machine with a CPU: start one with `ray start --address HOST:PORT`")
    with_gpu = [machine for machine in machines if machine.get("GPU", 0) >= 1] if use_gpu else []
    machines = with_gpu or machines
    places = [int(machine["GPU"]) if with_gpu else 1 for machine in machines]
    n_workers = n_workers or sum(places)
    on_one = min(n_workers, max(*places, -(-n_workers // len(machines))))
    n_cpus = [int(machine["CPU"]) for machine in machines]
    if n_threads and n_threads > max(n_cpus):
        raise KvlocalError(f"no machine of the Ray cluster has {n_threads} CPUs: give --threads {max(n_cpus)} or less")
    return Share(n_workers, n_threads or max(1, min(n_cpus) // on_one), 1 if with_gpu else 0)
