"""Reinforcement learning for a compressed cache: runs, checkpoints and commands."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import Container
from kvlocal.training.task_maker import make_tasks
from kvlocal.training.tasks import CheckedTask, Rule
from kvlocal_cli.main import main

torch = pytest.importorskip("torch")

from kvlocal.training.adapted_file import AdaptedFile  # noqa: E402
from kvlocal.training.checkpoint import TrainingError  # noqa: E402
from kvlocal.training.rl_training import RLSettings, RLTraining  # noqa: E402

SETTINGS = RLSettings(
    steps=3, tasks=2, answers=4, max_tokens=8, ratios=(0.8, 0.0), stride=16, rank=2, rate=1e-2, n_cells=256, parallel=4, n_held_out=2
)
# of a model without most of its layers some answers have one of these letters and some have not
TASKS = [CheckedTask("letters", task.messages, Rule(regex="[aeiou]{2}")) for task in make_tasks(4, 0, "training", (60, 90))]


def train(base, path, settings=SETTINGS, report=lambda found: None, **options):
    torch.set_num_threads(1)
    run = RLTraining(Container(base), "three", TASKS, TASKS[:2], settings, path, "cpu", n_threads=1, start=options.pop("start", None))
    return run, run.run(report, **options)


@pytest.fixture(scope="module")
def whole(three_layers, tmp_path_factory):
    """What an undisturbed run gave: path, reports, file."""
    path, reports = tmp_path_factory.mktemp("rl") / "whole.gguf", []
    return path, reports, train(three_layers, path, report=reports.append)[1]


def test_a_run_trains_and_tells_what_it_did(three_layers, whole):
    path, reports, file = whole
    assert [report.step for report in reports] == [0, 1, 2, 3, 3]
    assert set(reports[0].held_out) == set(reports[-1].held_out) == {"reward@0.8", "reward@0"}
    updates = file.record["updates"]
    assert len(updates) == 3 and any(update["signal"] > 0 for update in updates)
    assert all(0 <= update["reward"] <= 1 and update["reward"] == update["reward letters"] for update in updates)
    assert {update["ratio"] for update in updates} <= {0.8, 0.0}
    # float32 weights here and there, float16 cells there
    assert all(update["largest"] < 0.05 for update in updates if "largest" in update)
    assert any(np.abs(b).max() > 0 for _, b in file.adapter.values())
    loaded = AdaptedFile.load(path, Container(three_layers))
    assert (loaded.method, loaded.policies, loaded.ratios) == ("rl", ("gkv",), (0.8, 0.0))
    assert not path.with_name("whole.gguf.partial").exists()


def same(one: AdaptedFile, other: AdaptedFile) -> bool:
    return all((a == c).all() and (b == d).all() for (a, b), (c, d) in zip(one.adapter.values(), other.adapter.values(), strict=True))


def test_a_killed_run_goes_on_to_the_same_result(three_layers, whole, tmp_path):
    path = tmp_path / "killed.gguf"

    def killed(report):
        # after the first update's checkpoint
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(three_layers, path, report=killed, checkpoint_seconds=0)
    assert AdaptedFile.load(path).record["steps"] == 1
    reports = []
    _, file = train(three_layers, path, report=reports.append)
    assert [report.step for report in reports] == [2, 3, 3]
    assert same(file, whole[2])
    assert file.record["updates"] == whole[2].record["updates"]


def test_another_run_does_not_go_on_from_a_checkpoint(three_layers, tmp_path):
    path = tmp_path / "a.gguf"
    train(three_layers, path, limit_seconds=0.001)
    with pytest.raises(TrainingError, match="is of a run with other settings"):
        train(three_layers, path, replace(SETTINGS, seed=1))


def test_a_run_begins_with_what_was_trained_before(three_layers, whole, tmp_path):
    run, file = train(three_layers, tmp_path / "a.gguf", replace(SETTINGS, steps=1, start="x"), start=whole[2], limit_seconds=0, evaluate_every=0)
    assert run.step == 0 and same(file, whole[2])
    with pytest.raises(TrainingError, match="rank 2"):
        train(three_layers, tmp_path / "b.gguf", replace(SETTINGS, rank=4), start=whole[2])


def test_where_nothing_can_be_learned_the_adapter_stays(three_layers, tmp_path):
    right = [CheckedTask("all", task.messages, Rule(lacks=("no such word",))) for task in TASKS]
    run = RLTraining(Container(three_layers), "three", right, [], replace(SETTINGS, steps=1), tmp_path / "a.gguf", "cpu", n_threads=1)
    file = run.run(lambda found: None, evaluate_every=0)
    assert run.updates[0]["reward"] == 1 and run.updates[0]["signal"] == 0 and "largest" not in run.updates[0]
    assert all((b == 0).all() for _, b in file.adapter.values())


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(KvlocalError, match="ask for at least 2"):
        RLSettings(answers=1)
    with pytest.raises(KvlocalError, match="depend on more"):
        RLSettings(policy="streaming")


def test_commands(three_layers, tmp_path):
    pytest.importorskip("matplotlib")
    out, plot, tasks = tmp_path / "a.lora.gguf", tmp_path / "a.png", tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task.record()) + "\n" for task in TASKS * 3))
    command = ["adapt", "rl", str(three_layers), "-o", str(out), "--tasks", str(tasks), "--steps", "2", "--batch", "2", "--answers", "3"]
    command += ["--answer-tokens", "6", "--stride", "16", "--rank", "2", "--threads", "1", "--parallel", "3", "--plot", str(plot)]
    # killed in the middle, when the first checkpoint is there
    process = subprocess.Popen([sys.executable, "-m", "kvlocal_cli", *command, "--checkpoint-minutes", "0"], stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "a.lora.gguf.partial"
    try:
        deadline = time.monotonic() + 400
        while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert partial.exists(), process.stderr.read()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert "training takes about" in result.stderr and "11 tasks to train on, 1 held out" in result.stderr
    assert "going on after 1 updates" in result.stderr and "held out reward@0.8" in result.stderr and result.stdout == f"{out}\n"
    assert plot.stat().st_size > 5000
    assert "name another file or replace it with --force" in CliRunner().invoke(main, command).stderr
    told = CliRunner().invoke(main, ["adapt", "info", str(out), "-m", str(three_layers)])
    assert told.exit_code == 0 and "reward@0.8" in told.stdout

    evaluation = ["adapt", "eval", str(out), "-m", str(three_layers), "--tasks", str(tasks), "--limit", "3", "--policy", "gkv,streaming"]
    evaluation += ["--ratio", "0.8"]
    evaluation += ["--answers", "2", "--answer-tokens", "6", "--stride", "16", "--threads", "1", "--parallel", "2"]
    measured = CliRunner().invoke(main, [*evaluation, "--json"])
    assert measured.exit_code == 0, measured.stderr
    rows = json.loads(measured.stdout)["rows"]
    assert [(row["student"], row["adapter"], row["n"]) for row in rows] == [
        (student, adapter, 3) for student in ("full", "gkv@0.8", "streaming@0.8") for adapter in ("without", "with", "difference")
    ]
    assert all(row["lo"] <= row["mean"] <= row["hi"] for row in rows)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["adapt", "rl", "{model}", "-o", "{out}", "--tasks", "{bad}"], "bad.jsonl, line 1: it has no messages or no check"),
        (["adapt", "rl", "{model}", "-o", "{out}", "--kinds", "sums"], "no list of kinds"),
        (["adapt", "rl", "{model}", "-o", "{out}", "--task-tokens", "9-3"], "no range of tokens"),
        (["adapt", "rl", "{model}", "-o", "{out}", "--ratio", "1"], "from 0 to below 1"),
        (["adapt", "rl", "{model}", "-o", "{out}", "--policy", "recall"], "depend on more than the cells"),
        (["adapt", "rl", "{model}", "-o", "{out}", "--start", "{bad}"], "bad.jsonl"),
        (["adapt", "eval", "{bad}", "-m", "{model}"], "give one of --data and --tasks"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(three_layers, tmp_path, options, why):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    names = {"model": three_layers, "out": tmp_path / "out.gguf", "bad": bad}
    result = CliRunner().invoke(main, [option.format(**names) for option in options])
    assert result.exit_code != 0 and not (tmp_path / "out.gguf").exists()
    assert any(part in " ".join(result.stderr.split()) for part in why.split("|")), result.stderr
    assert "Traceback" not in result.stderr
