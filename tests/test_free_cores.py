"""FreeCores: threads for the cores that other programs leave free."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from kvlocal.cache.config import CacheConfig, CacheError
from kvlocal.llama import context as context_module
from kvlocal.llama.context import Context
from kvlocal.llama.errors import EngineError
from kvlocal.llama.free_cores import AUTO, FreeCores
from kvlocal.llama.model import Model


@pytest.fixture(scope="module")
def model(three_layers):
    with Model(three_layers, n_gpu_layers=0) as loaded:
        yield loaded


class Machine:
    """So many cores, which the threads share evenly with those of others."""

    def __init__(self, n_cores: int) -> None:
        self.n_cores, self.others = n_cores, 0
        self.threads = FreeCores(n_cores)
        self.seconds = 0.0

    def compute(self, seconds: float) -> list[int]:
        """Computes for so long, a hundredth of a second at once; with how many threads each."""
        used = []
        for _ in range(round(seconds * 100)):
            n = self.threads.n
            used.append(n)
            share = min(1, self.n_cores / (n + self.others))
            changed = self.threads.note(0.01, 0.01 * n * share)
            assert changed == (self.threads.n != n)
        return used


@pytest.mark.parametrize("n_cores", [2, 3, 8, 16])
def test_all_cores_where_nobody_else_computes(n_cores):
    assert set(Machine(n_cores).compute(60)) == {n_cores}


@pytest.mark.parametrize(("n_cores", "others"), [(2, 1), (2, 5), (4, 1), (8, 1), (8, 3), (16, 4)])
def test_what_others_leave(n_cores, others):
    machine = Machine(n_cores)
    machine.others = others
    machine.compute(0.5)
    assert machine.threads.n == max(1, n_cores - others)
    # and it stays so but for a trial now and then
    used = machine.compute(100)
    assert sum(n == max(1, n_cores - others) for n in used) > 0.97 * len(used)
    assert n_cores in used


def test_back_to_all_cores_when_the_others_have_ended():
    machine = Machine(8)
    machine.others = 4
    machine.compute(60)
    machine.others = 0
    assert machine.compute(10)[-1] == 8
    assert set(machine.compute(60)) == {8}


def test_some_of_the_others_end():
    machine = Machine(8)
    machine.others = 4
    machine.compute(30)
    machine.others = 2
    assert machine.compute(20)[-1] == 6


def test_once_is_no_reason():
    machine = Machine(4)
    for _ in range(20):
        machine.others = 2
        machine.compute(0.05)
        machine.others = 0
        assert set(machine.compute(0.5)) == {4}


# in a context


def decoded(model, n: int, monkeypatch, share: float, **options) -> set[int]:
    """With how many threads a context with two cores has decoded so many tokens, of which it had a share."""
    clock = SimpleNamespace(now=0.0)

    def elapsed():
        clock.now += 0.06
        return clock.now

    monkeypatch.setattr(context_module, "available_cores", lambda: 2)
    monkeypatch.setattr(context_module, "time", SimpleNamespace(perf_counter=elapsed, process_time=lambda: clock.now * share))
    with Context(model, n_cells=256, n_ubatch=64, **options) as made:
        used = set()
        for i in range(n):
            made.decode([i + 1], i)
            used.add(made._lib.llama_n_threads(made.pointer))
            assert made._lib.llama_n_threads_batch(made.pointer) in used or options.get("n_threads_batch")
    return used


@pytest.mark.cpu_only
def test_context_follows(model, monkeypatch):
    assert decoded(model, 6, monkeypatch, 1.0, n_threads=AUTO) == {1, 2}
    assert decoded(model, 6, monkeypatch, 2.0, n_threads=AUTO) == {2}


@pytest.mark.cpu_only
@pytest.mark.parametrize("options", [{}, {"n_threads": 2}, {"n_threads": AUTO, "n_threads_batch": 2}])
def test_context_that_was_told_does_not_follow(model, monkeypatch, options):
    assert decoded(model, 6, monkeypatch, 1.0, **options) == {2}


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_threads_that_sleep_tell_nothing(model, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert decoded(model, 6, monkeypatch, 1.0, n_threads=AUTO) == {2}


@pytest.mark.cpu_only
def test_waiting_for_the_disk_tells_nothing(model, monkeypatch):
    reads = iter(range(1000))
    monkeypatch.setattr(context_module, "disk_reads", lambda: next(reads))
    assert decoded(model, 6, monkeypatch, 1.0, n_threads=AUTO) == {2}


def test_settings():
    assert CacheConfig(n_threads=AUTO).n_threads == "auto"
    for n in (0, -1):
        with pytest.raises(CacheError, match="n_threads"):
            CacheConfig(n_threads=n)


def test_context_refuses_none_at_all(model):
    with pytest.raises(EngineError, match="n_threads is 0"):
        Context(model, n_cells=256, n_threads=0)


@pytest.mark.cpu_only
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is said of ggml's threads is of its build with libgomp")
def test_a_core_is_left_to_another_program(model, monkeypatch):
    """With real threads: one that computes beside them, on the two cores that they have."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("there is one core")
    monkeypatch.setattr(context_module, "available_cores", lambda: 2)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with Context(model, n_cells=256, n_ubatch=64, n_threads=AUTO) as made:
            deadline = time.monotonic() + 60
            while made._lib.llama_n_threads(made.pointer) > 1:
                assert time.monotonic() < deadline
                made.decode(np.arange(1, 9), 0)
                made.clear()
    finally:
        busy.kill()
        busy.wait()
        os.sched_setaffinity(0, before)
