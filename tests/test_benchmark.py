"""kvlocal.benchmark: what is measured is what is meant, and processes end."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvlocal.benchmark.busy import OtherProgram
from kvlocal.benchmark.comparison import Comparison, of_pairs, of_speeds, of_totals
from kvlocal.benchmark.measures import Bench, Side, alternate
from kvlocal.benchmark.plot import draw
from kvlocal.benchmark.process import BenchmarkError, Worker
from kvlocal.benchmark.readers import PlainReader, SessionReader
from kvlocal.benchmark.report import COLUMNS, cells, record
from kvlocal.benchmark.runner import names, run, select
from kvlocal.benchmark.script import Script
from kvlocal.benchmark.settings import QUICK, BenchSettings
from kvlocal.chat.config import SessionConfig
from kvlocal.llama.model import Model

N_ANSWER = 20
# bytes in the first six layers of SmolLM2: keys and values of a cell, and the queries of a window of 16 with the spare row
CELL = 6 * 3 * 2 * 64 * 2
QUERY = 6 * 9 * 64 * 4  # bytes of a recorded query
CONTEXT = {"n_ubatch": 64, "n_threads": 1}


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def script(model):
    return Script(model, N_ANSWER)


@pytest.fixture(scope="module")
def stock() -> Path:
    directory = Path(os.environ.get("KVLOCAL_STOCK_DIR", Path(__file__).parents[1] / "build/stock/dist/lib"))
    if not directory.is_dir():
        pytest.skip("there is no stock library: run `make stock`")
    return directory


def quick(short_smollm2, stock, **others) -> BenchSettings:
    return BenchSettings(Path(short_smollm2), Path(stock), n_threads=1, **QUICK | {"pairs": 2} | others)


# rows


def test_median_of_ratios():
    other = np.array([1.0, 2.0, 4.0, 8.0, 100.0])
    row = of_pairs("decode@1000", other * [3, 3, 3, 3, 0.1], other, "tokens/s")
    assert (row.ours, row.other, row.ratio, row.n, row.unit) == (10, 4, 3, 5, "tokens/s")
    assert row.lo < row.hi == 3


def test_ratio_of_sums():
    row = of_totals("share.score", [1, 2, 3], [10, 10, 10], "s")
    assert (row.ours, row.other, row.ratio, row.n) == (6, 30, 0.2, 3)
    assert 0.1 <= row.lo < 0.2 < row.hi <= 0.3
    # twice as fast, whatever the parts are
    row = of_speeds("chat", 100, [1, 4], [2, 8])
    assert (row.ours, row.other, row.ratio, row.lo, row.hi) == (20, 10, 2, 2, 2)


def test_interval_covers_the_truth():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(100):
        row = of_pairs("x", 2 * rng.lognormal(0, 0.1, 15), rng.lognormal(0, 0.1, 15), "")
        covered += row.lo <= 2 <= row.hi
    assert covered >= 85


def test_table_and_record():
    rows = [Comparison("decode@8000", 31.416, 9.1, 3.4523, 3.4, 3.5, 10, "tokens/s"), Comparison("rss@8000", 2e8, 4e8, 0.5, 0.5, 0.5, 1, "bytes")]
    assert [len(cells(row)) for row in rows] == [len(COLUMNS)] * 2
    assert cells(rows[0]) == ("decode@8000", "31.4", "9.1", "tokens/s", "3.452", "3.400 .. 3.500", "10")
    assert cells(rows[1]) == ("rss@8000", "200.0 MB", "400.0 MB", "", "0.500", "", "")
    result = json.loads(json.dumps(record(Bench(BenchSettings(Path("/a/m.gguf"), Path("/b")), print), rows)))
    assert set(result["rows"][0]) == {"name", "ours", "other", "ratio", "lo", "hi", "n", "unit"}
    assert result["settings"]["model"] == "m.gguf" and "/b" not in json.dumps(result)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Comparison(f"{kind}@{n}", 40, 10, 4, 3, 5, 9, "tokens/s") for kind in ("decode", "prefill") for n in (1000, 2000)]
    draw([*rows, Comparison("share.ring", -1, 10, -0.1, -0.2, 0.1, 9, "ms/token")], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


# names


def test_names():
    known = names(BenchSettings(Path(), Path()))
    assert len(set(known)) == len(known)
    assert {"decode@8000", "prefill@1000", "decode@equal-cells", "decode@busy", "kv-bytes@8000", "share.score"} <= set(known)
    assert {"chat40", "chat40@context-shift"} <= set(known) and "chat7" in names(BenchSettings(Path(), Path(), turns=7))


def test_select():
    settings = BenchSettings(Path(), Path())
    assert select(settings, []) == names(settings)
    assert select(settings, ["chat40"]) == ["chat40"]
    assert select(settings, ["rss", "prefill@1000"]) == ["prefill@1000", "rss@8000"]
    assert select(settings, ["share"]) == [name for name in names(settings) if name.startswith("share.")]
    with pytest.raises(BenchmarkError, match="choose decode@8000"):
        select(settings, ["decode@800"])


# the conversation


def test_script(model, script):
    for i in range(3):
        turn = script.turn(i)
        assert 60 <= len(model.tokenize(turn.text, parse_special=False)) <= 100
        assert len(turn.user) < 120 and len(turn.answer) == N_ANSWER
        assert turn.user.tolist() == Script(model, N_ANSWER).turn(i).user.tolist()
    assert script.turn(1).text != script.turn(2).text
    assert script.n_tokens(2) == len(script.prefix) + sum(len(script.turn(i).user) + N_ANSWER for i in range(2))


def session(model, script, **config):
    return SessionReader(model, script, SessionConfig(stride=32, n_ubatch=64, n_threads=1, **config))


def test_both_sides_read_the_same_tokens(model, script, monkeypatch):
    ours, plain, read = session(model, script, budget=500), PlainReader(model, script, CONTEXT | {"n_cells": 600}), [script.prefix]
    decode = plain._context.decode
    monkeypatch.setattr(plain._context, "decode", lambda tokens, pos: (read.append(tokens), decode(tokens, pos)))
    turns = [reader.turn()["tokens"] for reader in (ours, plain)]
    assert turns[0] == turns[1] and ours.history == plain.history == script.n_tokens(1)
    for reader in (ours, plain):
        while reader.extend(401, 50) < 401:
            pass
    assert ours.history == plain.history == 401
    assert ours._session.cache.ledger.ids.tolist() == np.concatenate(read).tolist()
    ours.close(), plain.close()


def test_plain_slice_is_taken_back(model, script):
    plain = PlainReader(model, script, CONTEXT | {"n_cells": 256})
    plain.extend(200, 1000)
    for n, at_once in ((8, 1), (40, 40), (40, 40)):
        assert plain.slice(n, at_once) > 0
        assert plain.history == 200 and plain._context.pos_max() == 199
    assert plain.figures()["capacity"] == 256 and plain.figures()["kv_bytes"] == pytest.approx(256 * CELL, rel=5e-3)
    plain.close()


def test_context_shift(model, script):
    plain = PlainReader(model, script, CONTEXT | {"n_cells": 256}, shift=True)
    n_keep = len(script.prefix)
    plain.extend(250, 1000)
    plain.read_answer(script.filler(7), 1)
    # the seventh token found the cache full
    assert plain.history == 257
    assert plain._context.pos_max() == 256 - (256 - n_keep) // 2
    plain.read_answer(script.filler(400), 64)
    assert plain.history == 657 and plain._context.pos_max() < 256
    plain.close()


def test_one_compression_in_a_stride(model, script):
    ours = session(model, script, budget=100, ratio=0.8, policy="kvzip-snapkv")
    ours.extend(500, 10_000)
    ours.slice(int(ours.figures()["until_compression"]), 1)
    before = ours.figures()
    assert before["until_compression"] == 32 and before["window"] == 32
    for i in range(1, 3):
        ours.slice(32, 1)
        after = ours.figures()
        assert after["compressions"] == before["compressions"] + i and after["until_compression"] == 32
    ours.slice(64, 64)
    assert ours.figures()["compressions"] == before["compressions"] + 4
    assert ours.figures()["until_compression"] == 32
    assert ours.figures()["kv_bytes"] == pytest.approx(256 * CELL + 33 * QUERY, rel=5e-3)
    ours.close()


@pytest.mark.parametrize("policy", ["gkv", "kvzip-snapkv"])
def test_turn_of_a_session_tells_its_parts(model, script, policy):
    ours = session(model, script, budget=100, ratio=0.8, policy=policy)
    ours.turn()
    figures = ours.turn()
    assert figures["tokens"] == len(script.turn(1).user) + N_ANSWER
    assert min(figures["score"], figures["plan"], figures["compact"]) > 0
    assert (figures["reread"] > 0) == (policy == "kvzip-snapkv")
    assert figures["score"] + figures["plan"] + figures["compact"] < figures["seconds"]
    ours.close()


# the order of slices


def test_alternate():
    class Clock:
        def __init__(self, name):
            self.name = name

        def call(self, do, reader, n, at_once):
            done.append((self.name, n))
            return n * at_once

    done, shown = [], []
    sides = [Side(Clock("a"), "", 33), Side(Clock("b"), "", 8, 2)]
    seconds = alternate(sides, 3, 2, "label", lambda *step: shown.append(step))
    assert seconds.tolist() == [[33, 16]] * 3
    assert done[:6] == [("a", 16), ("b", 4), ("b", 4), ("a", 17), ("a", 16), ("b", 4)]
    assert shown == [("label", i, 6) for i in range(6)]


# processes


@pytest.fixture
def worker(short_smollm2):
    with Worker("our library", stock=None, model=str(short_smollm2), n_answer=N_ANSWER) as started:
        yield started


def open_plain(worker, n_cells=256):
    worker.call("open_plain", reader="full", context={"n_ubatch": 64, "n_threads": 1, "n_cells": n_cells})


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_worker(worker):
    assert worker.call("version")["patches"]
    open_plain(worker)
    assert worker.call("extend", reader="full", history=150, at_most=1000) == 150
    assert worker.call("slice", reader="full", n=4, at_once=1) > 0
    assert 2**25 < worker.call("peak_rss") < 2**33


def test_worker_says_what_it_cannot_do(worker):
    with pytest.raises(BenchmarkError, match="cannot be made|too many"):
        open_plain(worker, 2**31)
    assert worker.call("version")


def test_worker_that_dies(worker):
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(BenchmarkError, match="our library was killed by signal 9"):
        worker.call("version")
    with pytest.raises(BenchmarkError, match="signal 9"):
        worker.call("version")


def test_worker_that_fails(worker):
    with pytest.raises(BenchmarkError, match=r"ended with code 1 \(KeyError: 'nobody'\)"):
        worker.call("turn", reader="nobody")


def test_worker_ends_with_its_parent(short_smollm2):
    code = (
        "import os, sys\nfrom kvlocal.benchmark.process import Worker\n"
        f"worker = Worker('x', stock=None, model={str(short_smollm2)!r}, n_answer=8)\n"
        "print(worker.pid, flush=True)\nos._exit(0)\n"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_worker_that_waits_does_not_spin(worker):
    def cpu_ticks() -> int:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    worker.call("open_plain", reader="full", context={"n_ubatch": 64, "n_threads": 2, "n_cells": 256})
    worker.call("slice", reader="full", n=4, at_once=1)
    time.sleep(0.2)
    before = cpu_ticks()
    time.sleep(0.5)
    assert cpu_ticks() - before <= 0.05 * os.sysconf("SC_CLK_TCK")


# another program


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_other_program_computes_until_the_block_ends():
    with pytest.raises(KeyboardInterrupt), OtherProgram() as other:
        deadline = time.monotonic() + 20
        while int(Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[11]) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert not is_running(other.pid)


def test_other_program_ends_with_its_parent():
    code = "import os\nfrom kvlocal.benchmark.busy import OtherProgram\nprint(OtherProgram().__enter__().pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# against the stock library


def test_what_is_allocated_is_the_share_of_the_history_that_stays(short_smollm2):
    """Budget, stride and recorded queries together, where the stride is not most of it."""
    settings = BenchSettings(short_smollm2, short_smollm2)
    assert settings.budget(8000) == 1600 - 192 and settings.budget(1000) == 100
    # where a device reads more at once
    settings = dataclasses.replace(settings, read_stride=512)
    assert settings.budget(8000) == 1600 - 64 - 512 and settings.budget(1000) == 100


def test_stock_library_must_be_one(short_smollm2, tmp_path):
    with pytest.raises(BenchmarkError, match="make stock"):
        Worker("stock", stock=str(tmp_path), model=str(short_smollm2), n_answer=8)


def test_patched_library_is_not_stock(short_smollm2):
    from kvlocal.llama.library import load

    with pytest.raises(BenchmarkError, match="has kvlocal's patches"):
        Worker("stock", stock=str(load().lib_dir), model=str(short_smollm2), n_answer=8)


def test_history_and_memory(short_smollm2, stock):
    settings = quick(short_smollm2, stock, histories=(300,), ratio=0.6)
    wanted = select(settings, ["prefill", "decode@300", "decode@300-snapkv", "read", "kv-bytes", "kv-used", "rss"])
    rows = {row.name: row for row in run(Bench(settings, lambda *_: None), wanted)}
    assert list(rows) == ["prefill@300", "decode@300", "decode@300-snapkv", "read@300", "kv-bytes@300", "kv-used@300", "rss@300"]
    for row in rows.values():
        assert row.lo <= row.ratio <= row.hi and row.ours > 0 and row.other > 0
    assert rows["decode@300"].n == 2 and rows["decode@300"].unit == "tokens/s"
    # 120 - 48 + 32 cells and the ring, against 300
    assert rows["kv-bytes@300"].ours == pytest.approx(256 * CELL + 17 * QUERY, rel=5e-3)
    assert rows["kv-bytes@300"].other == pytest.approx(512 * CELL, rel=5e-3)
    assert rows["kv-used@300"].ratio < 0.7


def test_cells_and_chat(short_smollm2, stock):
    settings = quick(short_smollm2, stock, cells=128)
    bench, shown = Bench(settings, lambda *step: shown.append(step)), []
    wanted = select(settings, ["decode@equal-cells", "decode@control", "chat4", "chat4@context-shift", "share"])
    rows = {row.name: row for row in run(bench, wanted)}
    # only some policies have those
    assert {*wanted} - {*rows} == {"share.nexus", "share.reread"} and 0 < rows["share.recall"].ratio < 1
    assert rows["chat4"].ours == rows["chat4@context-shift"].ours and rows["chat4"].n == 4
    assert 0 < rows["share.score"].ratio < 0.5 and abs(rows["share.ring"].ratio) < 1
    assert {step[0] for step in shown} >= {"chat4", "decode at 128 cells"} and bench.versions["llama_cpp"]


def test_beside_another_program(short_smollm2, stock):
    settings = quick(short_smollm2, stock, cells=128)
    rows = {row.name: row for row in run(Bench(settings, lambda *_: None), select(settings, ["decode@busy", "decode@busy-quiet"]))}
    assert list(rows) == ["decode@busy", "decode@busy-quiet"]
    assert rows["decode@busy"].ours == rows["decode@busy-quiet"].ours and {row.n for row in rows.values()} == {2}
    assert all(row.ours > 0 and row.other > 0 and row.unit == "tokens/s" for row in rows.values())


def test_what_else_a_policy_takes_time_for(short_smollm2, stock):
    settings = quick(short_smollm2, stock, policy="kvzip-snapkv")
    rows = {row.name: row for row in run(Bench(settings, lambda *_: None), select(settings, ["share"]))}
    assert rows["share.reread"].ours > 0 and "share.recall" not in rows


# the command


def command(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "kvlocal_cli", "bench", *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def test_command_without_stock(short_smollm2, tmp_path):
    done = command("-m", short_smollm2, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "run `make stock`" in done.stderr and done.stderr.count("\n") == 1


def test_command_with_an_unknown_name(short_smollm2, tmp_path):
    done = command("-m", short_smollm2, "--only", "decode@800", cwd=tmp_path)
    assert done.returncode == 2 and "choose decode@8000" in done.stderr


def test_command(short_smollm2, stock, tmp_path):
    done = command("-m", short_smollm2, "--stock", stock, "--quick", "--threads", 1, "--only", "kv-bytes,kv-used", "--json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["name", "ours", "other", "unit", "ratio", "95", "%", "interval", "n"]
    assert [line.split()[0] for line in lines[1:]] == ["kv-bytes@500", "kv-used@500"]
    assert [row["name"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]] == ["kv-bytes@500", "kv-used@500"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_interrupt_ends_the_workers(short_smollm2, stock):
    arguments = ["-m", str(short_smollm2), "--stock", str(stock), "--threads", "1", "--only", "decode@8000"]
    process = subprocess.Popen([sys.executable, "-m", "kvlocal_cli", "bench", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert "history of 8000" in process.stderr.readline()
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(workers) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert not any(map(is_running, workers))
