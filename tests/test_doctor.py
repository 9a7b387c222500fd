"""The doctor finds what is there and what is wrong, also where hardly anything works."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import click
import pytest
from click.testing import CliRunner

import kvlocal
from kvlocal.doctor.diagnosis import diagnose
from kvlocal.gguf.attention import Attention
from kvlocal.hub.catalogue import Catalogue
from kvlocal.llama import library
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal_cli.main import main


def doctor(*arguments, **environment):
    """The command in a process of its own: a library that is loaded stays loaded."""
    arguments = [sys.executable, "-m", "kvlocal_cli", "doctor", *map(str, arguments)]
    return subprocess.run(arguments, env=os.environ | environment, capture_output=True, text=True)


def test_report(smollm2):
    report = diagnose()
    loaded = library.load()
    assert report["problems"] == [] and "model" not in report
    assert report["kvlocal"] == kvlocal.__version__
    part = report["library"]
    assert part["path"] == str(loaded.lib_dir)
    assert (part["bindings"], part["patches"]) == (loaded.bindings_version, loaded.patch_level)
    assert part["api_version"] == loaded.lib.KVL_API_VERSION
    assert "CPU" in part["backends"] and part["features"]
    assert {device["backend"] for device in part["devices"]} <= set(part["backends"])
    (cpu,) = [device for device in part["devices"] if device["kind"] == "cpu"]
    assert cpu["name"] and cpu["memory_total"] >= cpu["memory_free"] > 0
    machine = report["machine"]
    assert 1 <= machine["usable_cores"] <= machine["cores"]
    assert 2**28 < (machine["memory_available"] or machine["memory_total"]) <= machine["memory_total"] < 2**50
    assert json.loads(json.dumps(report)) == report


def test_model(smollm2):
    report = diagnose(str(smollm2))
    assert report["problems"] == []
    model = report["model"]
    assert model["trained_context"] == 8192 and model["sliding_window"] == 0
    assert model["architecture"] == "llama" and model["template"] == "gguf"
    assert (model["compressible"], model["compressible_layers"], model["kv_heads"]) == (True, 30, 3)
    with Model(smollm2) as loaded:
        for kind, cost in model["kv_bytes_per_1000_cells"].items():
            with Context(loaded, n_cells=1024, type_k=kind, type_v=kind) as context:
                # llama.cpp tells it in hundredths of a MiB
                assert cost == pytest.approx(context.kv_bytes() / 1024 * 1000, rel=1e-3)


def test_models_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(tmp_path / "a" / "b"))
    catalogue = Catalogue.load()
    report = diagnose()
    models = report["models"]
    assert (models["exists"], models["writable"], models["present"]) == (False, True, [])
    assert models["disk_free"] > 0
    assert report["problems"] == [] and f"kvlocal pull {catalogue.default}" in report["hints"][0]

    entry = catalogue.entries[catalogue.default]
    entry.path.parent.mkdir(parents=True)
    entry.path.write_bytes(b"GGUF")
    os.truncate(entry.path, entry.size)
    report = diagnose()
    assert report["models"]["present"] == [entry.name] and report["hints"] == report["problems"] == []
    os.truncate(entry.path, entry.size - 1)
    report = diagnose()
    assert report["models"]["present"] == []
    assert "damaged" in report["problems"][0] and f"kvlocal pull --force {entry.name}" in report["problems"][0]


def test_models_directory_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(tmp_path / "file" / "models"))
    report = diagnose()
    assert not report["models"]["writable"]
    assert len(report["problems"]) == 1 and "set KVLOCAL_MODELS_DIR" in report["problems"][0]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(1000)])
def test_model_that_is_none(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    report = diagnose(str(path))
    assert report["model"] is None and report["library"]
    assert len(report["problems"]) == 1 and str(path) in report["problems"][0]


def test_command(smollm2):
    done = doctor("--json", smollm2)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert set(report) == {"kvlocal", "python", "platform", "library", "machine", "models", "model", "chat", "hints", "problems"}
    chat = report["chat"]
    assert (chat["policy"], chat["policy_why"]) == ("recall", "the default")
    assert chat["nexus"].endswith("smollm2-135m.nexus.gguf") and chat["nexus_why"].startswith("the first file that fits")
    assert (chat["device"], chat["threads"]) == ("CPU", report["machine"]["usable_cores"]) and "other programs" in chat["threads_why"]
    done = doctor(smollm2)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("by the policy recall (the default)", "Nexus tokens    /", "runs on         CPU (", "threads         "):
        assert text in done.stdout
    for text in (kvlocal.__version__, report["library"]["path"], "8,192 tokens", "f16 23.0 MB, q8_0 12.2 MB", "problems        none"):
        assert text in done.stdout


def test_no_library(smollm2, tmp_path):
    done = doctor("--json", smollm2, KVLOCAL_LIB_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert report["library"] is None and report["model"] is report["chat"] is None and report["machine"]["cores"]
    (problem,) = report["problems"]
    assert str(tmp_path) in problem and "libllama" in problem
    done = doctor(KVLOCAL_LIB_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    assert f"problem         {problem}" in done.stdout


def test_no_such_model():
    done = doctor("smollm2")
    assert (done.returncode, done.stderr) == (1, "")
    assert "did you mean smollm2-135m?" in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("NEXUS", "", "no file fits the model"), ("NEXUS", "off", "as it is set"), ("POLICY", "recall", "the policy recall uses none"),
     ("POLICY_ARG", "share=0", "the policy recall uses none")],
)  # fmt: skip
def test_why_a_chat_has_no_nexus_tokens(short_smollm2, monkeypatch, name, value, why):
    if value:
        monkeypatch.setenv(f"KVLOCAL_CHAT_{name}", value)
    chat = json.loads(CliRunner().invoke(main, ["doctor", "--json", str(short_smollm2)]).stdout)["chat"]
    assert (chat["policy"], chat["nexus"], chat["nexus_why"]) == ("recall", None, why)


def test_why_a_chat_has_another_policy(smollm2, short_smollm2, monkeypatch):
    """A model that cannot recall, with Nexus tokens and without."""
    of = Attention.of
    monkeypatch.setattr(Attention, "of", lambda model: replace(of(model), plain=False))
    for path, policy, tokens in ((smollm2, "hybrid", "there are Nexus tokens"), (short_smollm2, "kvzip-snapkv", "there are no Nexus tokens")):
        chat = json.loads(CliRunner().invoke(main, ["doctor", "--json", str(path)]).stdout)["chat"]
        assert chat["policy"] == policy and chat["policy_why"] == f"the model cannot recall, which recall needs, and {tokens} for it"
        assert bool(chat["nexus"]) == (policy == "hybrid")
        assert chat["nexus_why"].startswith("the first file that fits" if chat["nexus"] else "the policy kvzip-snapkv uses none")


def test_what_is_set_for_chats_counts(short_smollm2, monkeypatch):
    """In variables, or in the config file."""

    def doctor_says():
        return json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)

    for name, value in (("MODEL", str(short_smollm2)), ("POLICY", "snapkv"), ("THREADS", "1")):
        monkeypatch.setenv(f"KVLOCAL_CHAT_{name}", value)
    chat = doctor_says()["chat"]
    assert (chat["model"], chat["policy"], chat["policy_why"]) == (str(short_smollm2), "snapkv", "as it is set")
    assert (chat["threads"], chat["threads_why"]) == (1, "as it is set")
    monkeypatch.setenv("KVLOCAL_CHAT_MODEL", "qwen3-8b")
    report = doctor_says()
    assert report["chat"] is None and report["problems"] == [] and "run `kvlocal pull qwen3-8b`" in report["hints"][-1]


def test_a_chat_that_is_not_possible_is_a_problem(short_smollm2, monkeypatch):
    monkeypatch.setattr("kvlocal.doctor.memory_estimate.available_memory", lambda: 10**6)
    result = CliRunner().invoke(main, ["doctor", "--json", str(short_smollm2)])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["chat"] is None and "too little for any budget" in report["problems"][-1]


def test_without_a_command_three_are_proposed_that_exist():
    result = CliRunner().invoke(main, [])
    proposed = re.findall(r"^  kvlocal (\w+)", result.stdout, re.MULTILINE)
    assert result.exit_code == 0 and len(proposed) == 3 and set(proposed) <= set(main.list_commands(click.Context(main)))
    assert result.stdout.endswith(CliRunner().invoke(main, ["--help"]).stdout)
