"""A batch on a Ray cluster gives what one process gives, whoever is killed on the way: a worker, the driver, or Ray itself."""

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from ray_cluster import LocalRay  # noqa: E402
from test_batch import line, records_of, user  # noqa: E402

import kvlocal  # noqa: E402
from kvlocal.batch import on_ray  # noqa: E402
from kvlocal.batch.line import Failure, Result  # noqa: E402
from kvlocal.batch.on_ray import OnRay  # noqa: E402
from kvlocal.batch.ray_actor import worker_class  # noqa: E402
from kvlocal.batch.ray_cluster import Share, share_out  # noqa: E402
from kvlocal.batch.run import answered  # noqa: E402
from kvlocal.chat.config import SessionConfig  # noqa: E402
from kvlocal.errors import KvlocalError  # noqa: E402
from kvlocal.llama.placement import Placement  # noqa: E402
from kvlocal.llama.sampling import SamplingParams  # noqa: E402
from kvlocal_cli.batch_on_ray import LoadingThere  # noqa: E402
from kvlocal_cli.device_options import Where  # noqa: E402
from kvlocal_cli.options import Loading  # noqa: E402

SECONDS = 240.0  # for whatever is waited for on a busy machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalRay]:
    with LocalRay() as started:
        yield started


@pytest.fixture
def load(short_smollm2: Path) -> LoadingThere:
    config = SessionConfig(budget=128, stride=32, n_ubatch=64, max_tokens=4, sampling=SamplingParams(temperature=0, seed=0))
    return LoadingThere(Loading(Where(Placement()), nexus=None, may_change_policy=True), str(short_smollm2), config, 2, chooses_ram=False)


def command(model: Path | str, *arguments: object) -> list[str]:
    small = ["--temp", "0", "--seed", "0", "--kv-budget", "128", "--stride", "32", "--parallel", "2"]
    return [sys.executable, "-m", "kvlocal_cli", "batch", "-m", str(model), *small, *map(str, arguments)]


def write_lines(path: Path, n: int, max_tokens: int = 6) -> Path:
    """Short and long ones, some with a second turn; the fourth cannot be answered."""
    texts = [" ".join(f"Item {k} costs {(k * 7 + i) % 23} coins." for k in range(20 if i % 4 == 1 else 0)) for i in range(n)]
    turns = [[user(f"{text} What about {i}?"), user("Go on.")][: 1 + i % 2] for i, text in enumerate(texts)]
    path.write_bytes(b"".join(line(*each, id=i, max_tokens=max_tokens, **({"policy": "none"} if i == 3 else {})) for i, each in enumerate(turns)))
    return path


def answers(path: Path) -> list[dict]:
    """The records by line, without what depends on the time."""
    return sorted(({key: value for key, value in record.items() if key != "timings"} for record in records_of(path)), key=lambda it: it["line"])


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def expected(short_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What one process answers to 24 lines."""
    directory = tmp_path_factory.mktemp("expected")
    source = write_lines(directory / "in.jsonl", 24)
    done = subprocess.run(command(short_smollm2, source, "-o", directory / "out.jsonl", "--threads", "1"), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return answers(directory / "out.jsonl")


# The same results


def test_two_workers_give_what_one_process_gives(cluster, short_smollm2, expected, tmp_path):
    """Also behind a file that one process began: its key has nothing of where lines are answered."""
    source, out = write_lines(tmp_path / "in.jsonl", 24), tmp_path / "out.jsonl"
    some = tmp_path / "some.jsonl"
    some.write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[:5]))
    assert subprocess.run(command(short_smollm2, some, "-o", out, "--threads", "1", "--ordered"), capture_output=True).returncode == 1
    on_it = command(short_smollm2, source, "-o", out, "--ordered", "--ray", cluster.address, "--workers", "2")
    done = subprocess.run(on_it, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert "going on behind 5 lines, 1 failed" in done.stderr and "19 done" in done.stderr
    assert [record["line"] for record in records_of(out)] == list(range(1, 25))
    assert answers(out) == expected


def test_results_alone_on_standard_output(cluster, short_smollm2, tmp_path):
    """Ray writes there too, when a worker ends."""
    source = write_lines(tmp_path / "in.jsonl", 12, max_tokens=30)
    on_it = command(short_smollm2, source, "--ray", cluster.address, "--workers", "1", "--threads", "1")
    process = subprocess.Popen(on_it, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    first = process.stdout.readline()
    cluster.kill("ray::BatchWorker")
    rest, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and b"has ended: its lines are answered anew" in told
    assert sorted(json.loads(record)["line"] for record in [first, *rest.splitlines()]) == list(range(1, 13))


def test_no_line_is_read_before_there_is_place_for_it(cluster, load):
    taken = []

    def lines() -> Iterator[bytes]:
        for i in range(1_000_000):
            taken.append(i)
            yield line(user("Hi"))

    place = OnRay(cluster.address, load, parallel=2, n_workers=1, n_threads=1)
    outcomes = answered(lines(), place)
    for n in range(1, 9):
        assert isinstance(next(outcomes), Result)
        assert n <= len(taken) <= n + place.n_lines
    outcomes.close()
    assert not ray.is_initialized()


# Kills


def test_workers_that_are_killed_cost_nothing(cluster, short_smollm2, expected, tmp_path):
    source, out = write_lines(tmp_path / "in.jsonl", 24), tmp_path / "out.jsonl"
    on_it = command(short_smollm2, source, "-o", out, "--ray", cluster.address, "--workers", "2")
    process = subprocess.Popen(on_it, stderr=subprocess.PIPE, text=True)
    for n in (2, 8, 14):
        wait_until(lambda n=n: n_lines(out) >= n or process.poll() is not None)
        for pid in cluster.workers()[:1]:
            os.kill(pid, signal.SIGKILL)
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and "Traceback" not in told
    assert told.count("has ended: its lines are answered anew") >= 2
    assert answers(out) == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_driver_goes_on_where_it_was_stopped(cluster, short_smollm2, expected, tmp_path, number):
    source, out = write_lines(tmp_path / "in.jsonl", 24), tmp_path / "out.jsonl"
    on_it = command(short_smollm2, source, "-o", out, "--ray", cluster.address, "--workers", "2")
    process = subprocess.Popen(on_it, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: n_lines(out) >= 4)
    process.send_signal(number)
    _, told = process.communicate(timeout=SECONDS)
    n = n_lines(out)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130) and n < 24 and "Traceback" not in told
    # their workers end with it
    wait_until(lambda: not cluster.workers())
    done = subprocess.run(on_it, capture_output=True, text=True)
    assert done.returncode == 1 and f"going on behind {n} lines" in done.stderr
    assert answers(out) == expected


def test_ray_itself_is_stopped(short_smollm2, expected, tmp_path):
    source, out = write_lines(tmp_path / "in.jsonl", 24), tmp_path / "out.jsonl"
    with LocalRay() as first:
        on_it = command(short_smollm2, source, "-o", out, "--ray", first.address, "--workers", "2")
        process = subprocess.Popen(on_it, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: n_lines(out) >= 4)
        first.kill("")
        _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and "Traceback" not in told
    assert "run the same command again" in told.splitlines()[-1]
    n = n_lines(out)
    assert 4 <= n < 24 and out.read_bytes().endswith(b"\n")
    with LocalRay() as second:
        on_it[on_it.index(first.address)] = second.address
        done = subprocess.run(on_it, capture_output=True, text=True)
    assert done.returncode == 1 and f"going on behind {n} lines" in done.stderr
    assert answers(out) == expected


def test_a_line_that_its_workers_end_with_is_given_up(cluster, load, monkeypatch):
    monkeypatch.setattr(on_ray, "_TRIES", 2)
    load = dataclasses.replace(load, config=dataclasses.replace(load.config, max_tokens=3000))
    told: list[str] = []
    place = OnRay(cluster.address, load, parallel=2, n_workers=1, n_threads=1, tell=told.append)
    killing = threading.Event()

    def kill() -> None:
        while not killing.wait(1.0):
            # as soon as it has the line
            for pid in cluster.processes("ray::BatchWorker.answer"):
                os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    try:
        (outcome,) = answered([line(user("Tell me a long story."), id="slow")], place)
    finally:
        killing.set()
    assert isinstance(outcome, Failure) and outcome.id == "slow" and "2 workers ended while they had it" in str(outcome.error)
    assert len(told) == 2


# What is wrong


def test_what_a_worker_needs_and_lacks_is_one_sentence(cluster, short_smollm2, load, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", 1)
    here = platform.node()
    for model, sentence in (("nowhere.gguf", f"{tmp_path}/nowhere.gguf"), ("hf:a/b/c.gguf", "run `kvlocal pull hf:a/b/c.gguf`")):
        on_it = command(model, source, "-o", "out.jsonl", "--ray", cluster.address, "--workers", "1")
        done = subprocess.run(on_it, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and sentence in done.stderr, done.stderr
        assert done.stderr.startswith(f"kvlocal: no worker can be on {here}: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr(kvlocal, "__version__", "99")
    with pytest.raises(KvlocalError, match=r"kvlocal is of version .* there and 99 here"):
        OnRay(cluster.address, load, n_workers=1, n_threads=1)
    assert not ray.is_initialized()


def test_a_machine_without_kvlocal_says_so():
    """The class of workers is code that needs no kvlocal to be unpickled."""
    program = "import sys; sys.modules['kvlocal'] = None; import pickle; print(pickle.load(sys.stdin.buffer)().begin('1', b'')['error'])"
    done = subprocess.run([sys.executable, "-c", program], input=ray.cloudpickle.dumps(worker_class()), capture_output=True)
    assert b"install kvlocal 1 for the Python that Ray runs with" in done.stdout, done.stderr


def test_another_file_of_the_model_on_a_machine(cluster, load, short_smollm2, tmp_path):
    """What has another one than the first worker had is left out, and the batch ends when nobody is left."""
    model = tmp_path / "model.gguf"
    model.write_bytes(short_smollm2.read_bytes())
    told: list[str] = []
    place = OnRay(cluster.address, dataclasses.replace(load, name=str(model)), parallel=2, n_workers=2, n_threads=1, tell=told.append)
    outcomes = answered((line(user("Hi")) for _ in range(1_000_000)), place)
    assert isinstance(next(outcomes), Result)
    other = tmp_path / "other.gguf"
    other.write_bytes(short_smollm2.read_bytes() + b"\0")
    other.replace(model)
    cluster.kill("ray::BatchWorker")
    with pytest.raises(KvlocalError, match="are other files there"):
        list(outcomes)
    assert any("are other files there" in each for each in told)


def test_there_is_no_cluster(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", 1)
    for address, sentence in (("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"), ("nonsense", "is no address of a Ray cluster")):
        done = subprocess.run(command("any", source, "--ray", address), capture_output=True, text=True)
        assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1
    done = subprocess.run(command("any", source, "--workers", "2"), capture_output=True, text=True)
    assert done.returncode == 2 and "give its address with --ray too" in done.stderr


def test_ray_is_not_installed(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", 1)
    program = "import sys; sys.modules['ray'] = None; from kvlocal_cli.main import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, *command("any", source, "--ray", "auto")[3:]], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "kvlocal: kvlocal batch --ray needs Ray, which is not installed: pip install 'kvlocal[ray]'\n"


# What workers get


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("nodes", "n_workers", "n_threads", "use_gpu", "share"),
    [
        ([node(8)], None, None, True, Share(1, 8, 0)),
        ([node(8), node(6), node(64, alive=False)], None, None, True, Share(2, 6, 0)),
        ([node(8), node(8)], 3, None, False, Share(3, 4, 0)),
        ([node(2)], 5, None, False, Share(5, 1, 0)),
        ([node(8)], 2, 3, False, Share(2, 3, 0)),
        ([node(8), node(32, gpus=4)], None, None, True, Share(4, 8, 1)),
        ([node(8), node(32, gpus=4)], 1, None, True, Share(1, 32, 1)),
        ([node(8), node(32, gpus=4)], None, None, False, Share(2, 8, 0)),
    ],
)
def test_share(nodes, n_workers, n_threads, use_gpu, share):
    assert share_out(nodes, n_workers, n_threads, use_gpu) == share


def test_a_share_that_no_machine_has():
    with pytest.raises(KvlocalError, match="give --threads 8 or less"):
        share_out([node(4), node(8)], None, 9, False)
    with pytest.raises(KvlocalError, match="no machine with a CPU"):
        share_out([node(4, alive=False)], None, None, True)
