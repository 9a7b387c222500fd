"""Evaluations on a real model: what is compared is what the model predicts, and the command can be stopped and goes on."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from lora_file import write_lora

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.dialogues import Dialogue
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.dialogue import MAX_ANSWER, DialogueTask
from kvlocal.evaluation.history import read_history
from kvlocal.evaluation.recall import RecallTask, answers, chooses
from kvlocal.evaluation.recall_chats import Question
from kvlocal.evaluation.reference import ReferenceCache, log_softmax
from kvlocal.evaluation.runner import Measurement
from kvlocal.evaluation.variants import FULL, Variant
from kvlocal.gguf.attention import Attention
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal_cli.main import main

# One thread: two would wait for each other wherever the cores are shared.
BASE = SessionConfig(stride=16, n_threads=1, sampling=SamplingParams(temperature=0, seed=0))

SEA = "The sea covers most of the earth. It is deep, cold and salt, and there is more life in it than anywhere on land."
DIALOGUES = [
    Dialogue((("Tell me about the sea.", SEA), ("And lakes?", "Lakes are smaller, and most of them hold fresh water."))),
    Dialogue((("What is a harbour?", "A place where ships are safe from the waves."), ("Name one.", "Rotterdam is a large harbour in Europe."))),
    Dialogue(
        (("What do gulls eat?", "Fish, insects, and what people leave behind."), ("Do they sleep?", "Yes, often while they float on the water.")),
    ),
]


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as m:
        yield m


@pytest.fixture(scope="module")
def whole_model(smollm2):
    with Model(smollm2) as m:
        yield m


def dialogue_task(model, tmp_path, dialogues=DIALOGUES, concat=2):
    return DialogueTask(model, BASE, dialogues, concat, ReferenceCache(tmp_path), "test")


# Dialogues


def test_the_reference_is_what_the_model_predicts(model, tmp_path):
    task = dialogue_task(model, tmp_path)
    chat = task._chats[0]
    assert task.n_chats == 2 and chat.user == "Name one." and len(chat.history) == 6
    measured = task.measure(0, FULL)
    rows = []
    # llama.cpp rounds differently in batches of more than 32 tokens, and no part of these turns is as long
    with Context(model, n_cells=512, n_threads=1) as context:
        for start in range(0, len(chat.tokens), 32):
            context.decode(chat.tokens[start : start + 32], start, logits="all")
            rows.append(context.logits_all())
    logp = log_softmax(np.concatenate(rows))
    reference, _ = task._reference(0)
    n = len(reference.tokens)
    assert model.detokenize(reference.tokens) == chat.answer and np.array_equal(chat.tokens[-n:], reference.tokens)
    expected = logp[-n - 1 : -1]
    assert reference.loss == pytest.approx(-expected[np.arange(n), reference.tokens], abs=1e-3)
    assert np.exp(reference.logp.astype(np.float32)) == pytest.approx(np.exp(expected), abs=1e-3)
    assert measured.compression == 0 and measured.values == {"kl": [0], "agreement": [1], "cross_entropy": [pytest.approx(reference.loss.mean())]}


def test_nothing_removed_changes_nothing(model, tmp_path):
    task = dialogue_task(model, tmp_path)
    measured = task.measure(0, Variant("gkv", 0.0, "gkv"))
    assert measured.compression == 0
    assert abs(measured.values["kl"][0]) < 1e-4 and measured.values["agreement"] == [1]
    assert measured.values["cross_entropy"] == pytest.approx(task.measure(0, FULL).values["cross_entropy"], abs=1e-4)


def test_less_kept_is_further_away(model, tmp_path):
    task = dialogue_task(model, tmp_path, concat=3)
    found = [task.measure(0, Variant("streaming", ratio, "streaming")) for ratio in (0.3, 0.6)]
    assert [measured.compression for measured in found] == pytest.approx([0.3, 0.6], abs=0.01)
    assert 1e-3 < found[0].values["kl"][0] < found[1].values["kl"][0]
    assert task.measure(0, Variant("streaming", 0.6, "streaming")) == found[1]


def test_the_full_context_is_read_once(model, tmp_path, monkeypatch):
    first = dialogue_task(model, tmp_path).measure(0, FULL)
    monkeypatch.setattr(ChatSession, "__init__", None)
    assert dialogue_task(model, tmp_path).measure(0, FULL) == first


def test_chats_that_cannot_be_measured_are_counted(model, tmp_path):
    single, long = Dialogue((("a", "b"),)), Dialogue((("Go on. " * 4000, "b"), ("c", "d")))
    task = dialogue_task(model, tmp_path, [single, DIALOGUES[0], long], concat=1)
    assert (task.n_chats, task.n_without_history, task.n_too_long) == (1, 1, 1)
    assert dialogue_task(model, tmp_path, [single, DIALOGUES[0]]).n_chats == 1


def test_long_answers_are_cut(model, tmp_path):
    answer = "Ein Ünglück kommt sëlten allein ☃. " * 60
    (chat,) = dialogue_task(model, tmp_path, [Dialogue((("a", "b"), ("c", answer)))])._chats
    assert answer.startswith(chat.answer) and MAX_ANSWER - 3 <= len(model.tokenize(chat.answer, parse_special=False)) <= MAX_ANSWER


# Recall


def test_recall(model):
    task = RecallTask(model, BASE, 2, 200, 0)
    full, none = task.measure(0, FULL), task.measure(0, Variant("streaming", 0.7, "streaming"))
    assert full.compression == 0 and none.compression == pytest.approx(0.7, abs=0.01)
    for measured in (full, none):
        assert list(measured.values) == ["choice", "choice@<500", "greedy", "greedy@<500"]
        assert all(len(values) == 2 and set(values) <= {0.0, 1.0} for values in measured.values.values())
    assert task.measure(0, FULL) == full


def test_what_was_just_said_is_chosen(whole_model):
    question = Question("pet", "What is the name of my cat?", "The name of your cat is", "Noodle", ("Biscuit", "Waffles", "Tango"), 0)
    with ChatSession(whole_model, BASE, spare=160, n_outputs=BASE.n_ubatch) as session:
        session.add_turn("user", "Please remember this for later. The name of my cat is Noodle.")
        session.add_turn("assistant", "The name of your cat is Noodle.")
        assert chooses(session, question) and answers(session, question)
        other = replace(question, answer="Biscuit", distractors=("Noodle", "Waffles", "Tango"))
        assert not chooses(session, other) and not answers(session, other)


def test_questions_leave_no_trace(whole_model):
    task = RecallTask(whole_model, BASE, 2, 200, 0)
    (chat,) = task._chats
    reading = read_history(whole_model, BASE, Variant("streaming", 0.5, "streaming"), chat.history, chat.n_history, chat.n_prefix, 160, None)
    with reading as (session, compression):
        before = session.kv
        assert before.history_tokens == chat.n_history and compression == 1 - before.used / chat.n_history
        for question in chat.questions:
            answers(session, question)
        after = session.kv
        assert (after.used, after.history_tokens, session.messages) == (before.used, before.history_tokens, chat.history)


def test_a_history_that_is_too_long(model):
    with pytest.raises(KvlocalError, match="too long for a model trained on 8192"):
        RecallTask(model, BASE, 8, 8000, 0)


# The command


def dialogues_file(path, n=6):
    lines = [{"history": [{"user": user, "bot": f"{bot} ({i})"} for user, bot in DIALOGUES[i % 3].turns]} for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(path, tmp_path, task, *more):
    return ["eval", task, "-m", str(path), "--threads", "1", "--stride", "16", "--cache", str(tmp_path / "cache"), *map(str, more)]


def test_the_dialogue_command(short_smollm2, tmp_path):
    data, out = dialogues_file(tmp_path / "d.jsonl", 4), tmp_path / "out.json"
    more = ("--data", data, "--concat", 2, "--policy", "streaming,snapkv:window=8", "--ratio", "0.3", "--json", out)
    result = CliRunner().invoke(main, arguments(short_smollm2, tmp_path, "dialogue", *more))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].split() == ["policy", "ratio", "removed", "kl", "agreement", "cross_entropy"]
    assert "6 of 6 measurements" in result.stderr
    document = json.loads(out.read_text())
    assert [(row["policy"], row["ratio"]) for row in document["rows"][::3]] == [("full", 0), ("streaming", 0.3), ("snapkv:window=8", 0.3)]
    assert {row["n"] for row in document["rows"]} == {2} and {row["task"] for row in document["rows"]} == {"dialogue"}
    assert all(row["lo"] <= row["mean"] <= row["hi"] for row in document["rows"])
    assert all(row["compression"] == pytest.approx(row["ratio"], abs=0.02) for row in document["rows"])
    assert document["settings"]["concat"] == 2 and document["settings"]["seed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "d.jsonl", "out.json"]


def test_an_adapter_against_the_model_without_it(short_smollm2, tmp_path):
    data, out, lora = dialogues_file(tmp_path / "d.jsonl", 2), tmp_path / "out.json", write_lora(tmp_path / "a.gguf", short_smollm2)
    more = ("--data", data, "--concat", 2, "--policy", "streaming", "--ratio", "0.3", "--json", out)

    def kls(*options):
        result = CliRunner().invoke(main, arguments(short_smollm2, tmp_path, "dialogue", *more, *options, "--force"))
        assert result.exit_code == 0, result.stderr
        document = json.loads(out.read_text())
        assert document["settings"].get("full_without_lora", False) == ("--full-without-lora" in options)
        return [row["mean"] for row in document["rows"] if row["metric"] == "kl"]

    plain, adapted, against_plain = kls(), kls("--lora", lora), kls("--lora", lora, "--full-without-lora")
    assert plain[0] == adapted[0] == 0
    # what the adapter changes is more than what is lost without it
    assert against_plain[0] > 2 * plain[1] and against_plain[1] > 2 * adapted[1]
    # without an adapter there is nothing to tell apart
    assert kls("--full-without-lora") == plain


def test_an_archive_of_another_type(short_smollm2, tmp_path):
    data, out = dialogues_file(tmp_path / "d.jsonl", 4), tmp_path / "out.json"
    more = ("--data", data, "--concat", 4, "--policy", "recall:archive=ram,recall:archive=ram:archive_type=q4_0", "--ratio", "0.7", "--json", out)
    result = CliRunner().invoke(main, arguments(short_smollm2, tmp_path, "dialogue", *more))
    assert result.exit_code == 0, result.stderr
    own, other = (row["mean"] for row in json.loads(out.read_text())["rows"] if row["metric"] == "kl" and row["policy"] != "full")
    assert own > 0 and own != other


def test_what_a_model_cannot_recall_with_is_left_out(short_smollm2, tmp_path, monkeypatch):
    of = Attention.of
    monkeypatch.setattr(Attention, "of", lambda model: replace(of(model), plain=False))
    more = ("--data", dialogues_file(tmp_path / "d.jsonl", 4), "--concat", 2, "--policy", "recall,recall:archive=off", "--ratio", "0.3,0.5")
    result = CliRunner().invoke(main, arguments(short_smollm2, tmp_path, "dialogue", *more))
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("kvlocal: recall cannot be measured: ") == 1 and "soft cap or attention sinks" in result.stderr
    assert "6 of 6 measurements" in result.stderr and "recall:archive=off" in result.stdout


def test_the_recall_command(short_smollm2, tmp_path):
    more = ("--questions", 1, "--tokens", 150, "--policy", "streaming", "--ratio", "0.5")
    first, second = (CliRunner().invoke(main, arguments(short_smollm2, tmp_path, "recall", *more)) for _ in range(2))
    assert first.exit_code == 0, first.stderr
    assert first.stdout == second.stdout and first.stdout.count("full") == 3
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "more, code, sentence",
    [
        (("--policy", "gvk"), 2, "choose gkv"),
        (("--ratio", "80"), 2, "between 0 and 1"),
        (("--window", "999"), 2, "micro-batch"),
        (("--plot", "p.txt"), 2, "must end in .png"),
        (("--json", "no/such/out.json"), 1, "cannot keep results in no/such/out.json.partial"),
        (("--tokens", "9000"), 1, "too long"),
    ],
)
def test_wrong_usage_is_one_sentence(smollm2, tmp_path, more, code, sentence):
    result = CliRunner().invoke(main, arguments(smollm2, tmp_path, "recall", "--questions", 1, "--tokens", 100, *more))
    assert (result.exit_code, result.stdout) == (code, "") and result.stderr.startswith("kvlocal: ")
    assert sentence in result.stderr and result.stderr.count("\n") == 1


def test_one_failure_costs_only_itself(short_smollm2, tmp_path, monkeypatch):
    measure = DialogueTask.measure

    def sometimes(self, index, variant):
        if (index, variant.policy) == (0, "streaming"):
            raise KvlocalError("no")
        return measure(self, index, FULL) if variant == FULL else Measurement(0.3, {"kl": [1.0]})

    monkeypatch.setattr(DialogueTask, "measure", sometimes)
    data, out = dialogues_file(tmp_path / "d.jsonl", 4), tmp_path / "out.json"
    command = arguments(short_smollm2, tmp_path, "dialogue", "--data", data, "--concat", 2, "--policy", "streaming", "--ratio", "0.3", "--json", out)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and "chat 1 with streaming at 0.3: no" in result.stderr
    document = json.loads(out.read_text())
    assert [row["n"] for row in document["rows"]] == [2, 2, 2, 1] and document["settings"]["failed"] == 1
    monkeypatch.setattr(DialogueTask, "measure", measure)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and "going on after 3 measurements" in result.stderr and not (tmp_path / "out.json.partial").exists()


def test_stopped_in_the_middle(short_smollm2, tmp_path):
    data, out = dialogues_file(tmp_path / "d.jsonl", 4), tmp_path / "out.json"
    common = ("--data", data, "--concat", 1, "--policy", "streaming", "--ratio", "0.3,0.5")
    command = arguments(short_smollm2, tmp_path, "dialogue", *common, "--json", out)
    partial = tmp_path / "out.json.partial"
    process = subprocess.Popen([sys.executable, "-m", "kvlocal_cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, told = process.communicate(timeout=30)
    assert process.returncode == 130 and stdout == "" and "interrupted" in told and "Traceback" not in told
    done = partial.read_bytes().count(b"\n")
    assert 2 <= done < 12 and not out.exists()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and f"going on after {done} measurements" in result.stderr
    assert not partial.exists()
    whole = CliRunner().invoke(main, arguments(short_smollm2, tmp_path, "dialogue", *common))
    assert whole.stdout == result.stdout
