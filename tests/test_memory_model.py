"""Questions about long conversations on a real model: what is compared, evidence that is there or not, long histories, the commands."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.evaluation.evidence import evidence_tokens
from kvlocal.evaluation.history import turn_tokens
from kvlocal.evaluation.memory import METRICS, MemoryTask, ask
from kvlocal.evaluation.memory_chats import Evidence, MemoryChat, MemoryQuestion
from kvlocal.evaluation.variants import FULL, Variant
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.nexus.discovery import nexus_for
from kvlocal.template.chat_template import ChatTemplate
from kvlocal_cli.main import main

# One thread: two would wait for each other wherever the cores are shared.
BASE = SessionConfig(stride=16, n_ubatch=64, n_threads=1, sampling=SamplingParams(temperature=0, seed=0))

NOTHING_REMOVED = Variant("gkv", 0.0, "gkv")
STREAMING = Variant("streaming", 0.7, "streaming")


def chat(n_turns=12):
    """A fact in the second turn and one in the last."""
    history = []
    for i in range(n_turns):
        history.append({"role": "user", "content": f"Tell me about the {i}th day by the sea."})
        history.append({"role": "assistant", "content": "It rained, then it cleared."})
    history[2]["content"] = "Hello there. The name of my cat is Noodle."
    history[-2]["content"] = "The name of my dog is Biscuit."

    def question(category, animal, name, wrong, message):
        evidence = (Evidence(message, f"The name of my {animal} is {name}."),)
        return MemoryQuestion(category, f"What is the name of my {animal}?", f"The name of your {animal} is", name, wrong, evidence)

    early = question("early", "cat", "Noodle", ("Waffles", "Tango"), 2)
    late = question("late", "dog", "Biscuit", ("Waffles", "Tango"), 2 * n_turns - 2)
    return MemoryChat(history, (early, late, replace(early, category="unknown", evidence=())))


def only(measured, metric):
    return {name.partition("=")[2]: values for name, values in measured.values.items() if name.startswith(f"{metric}@category=")}


def test_evidence_is_found_in_the_tokens(shallow_model):
    talk = chat(3)
    turns = turn_tokens(shallow_model, ChatTemplate.from_model(shallow_model), talk.history)
    every = np.concatenate(turns)
    for question in talk.questions[:2]:
        tokens = evidence_tokens(shallow_model, turns, question.evidence)
        assert shallow_model.detokenize(every[tokens]).strip() == question.evidence[0].text
    # not in the message: all of it
    whole = evidence_tokens(shallow_model, turns, [Evidence(1, "something else")])
    assert np.array_equal(whole, len(turns[0]) + len(turns[1]) + np.arange(len(turns[2])))
    assert len(evidence_tokens(shallow_model, turns, [])) == 0


def test_nothing_removed_changes_nothing(shallow_model):
    task = MemoryTask(shallow_model, BASE, [chat()])
    full, same = task.measure(0, FULL), task.measure(0, NOTHING_REMOVED)
    assert task.n_too_long == 0 and full.compression == same.compression == 0
    assert full.values.keys() == same.values.keys()
    for name, values in same.values.items():
        assert values == pytest.approx(full.values[name], abs=1e-4), name
    assert full.values["kl"] == [0, 0, 0] and full.values["survival"] == [1, 1]
    assert only(full, "nll").keys() == {"early", "late", "unknown"} and only(full, "survival").keys() == {"early", "late"}
    assert sum(len(values) for name, values in full.values.items() if name.startswith("nll@distance=")) == 2
    assert set(full.values) <= set(task.metrics) and set(METRICS) <= set(full.values)


def test_evidence_that_is_gone_does_not_survive(shallow_model):
    task = MemoryTask(shallow_model, BASE, [chat()])
    measured = task.measure(0, STREAMING)
    assert measured.compression == pytest.approx(0.7, abs=0.03)
    assert only(measured, "survival") == {"early": [0], "late": [1]}
    assert measured.values["kl"][0] > 1e-3 and task.measure(0, STREAMING) == measured


def test_the_weights_are_the_answers_attention(shallow_model):
    talk = chat(4)
    task = MemoryTask(shallow_model, BASE, [talk])
    (early, late, unknown) = task._expected(0)
    assert unknown.weights is None
    question, tokens = talk.questions[0], task._chats[0].evidence[0]
    with ChatSession(shallow_model, replace(BASE, policy="snapkv", budget=1024), spare=64, n_outputs=64) as session:
        for message in talk.history:
            session.add_turn(message["role"], message["content"])
        session.add_turn("user", question.text)
        session.add_turn("assistant", "The name of your cat is Noodle")
        expected = session.cache.native.scores(n_query=BASE.window)[..., tokens]
    assert early.weights == pytest.approx(expected, abs=1e-3)
    assert early.weights.shape[-1] == len(tokens) and late.weights.shape[-1] == len(task._chats[0].evidence[1])


def test_questions_leave_no_trace(shallow_model):
    talk = chat(4)
    with ChatSession(shallow_model, replace(BASE, policy="streaming", budget=80), spare=64, n_outputs=64) as session:
        for message in talk.history:
            session.add_turn(message["role"], message["content"])
        session.compress()
        before = session.kv
        first = ask(session, talk.questions[0], np.array([3, 4]))
        again = ask(session, talk.questions[0], np.array([3, 4]))
        assert (session.kv.used, session.kv.history_tokens, session.messages) == (before.used, before.history_tokens, talk.history)
    assert np.array_equal(first.logits, again.logits) and first.place == again.place and first.weights is None
    assert shallow_model.detokenize(first.tokens).strip() == "Noodle"


def test_a_history_past_the_trained_context(shallow_model, monkeypatch):
    talk = chat(24)
    base = replace(BASE, budget=96)
    whole = MemoryTask(shallow_model, base, [talk])
    reference = whole._expected(0)
    monkeypatch.setattr(shallow_model, "n_ctx_train", 512)
    task = MemoryTask(shallow_model, base, [talk])
    assert task.n_too_long == 1 and task._chats[0].n_history > 512
    assert task.measure(0, FULL).values == {}
    measured = task.measure(0, Variant("streaming", 0.0, "streaming"))
    assert measured.compression == pytest.approx(1 - 96 / task._chats[0].n_history, abs=0.01)
    assert "kl" not in measured.values and len(measured.values["choice"]) == 3 and len(measured.values["survival"]) == 2
    assert only(measured, "survival")["late"] == [1]
    # the attention in a short conversation is nearly that in the whole one
    for cut, full in zip(task._expected(0)[:2], reference[:2], strict=True):
        assert cut.weights.shape == full.weights.shape
        assert np.corrcoef(cut.weights.ravel(), full.weights.ravel())[0, 1] > 0.8


def test_what_is_read_for_the_attention_fits(shallow_model, monkeypatch):
    monkeypatch.setattr(shallow_model, "n_ctx_train", 512)
    talk = chat(40)
    questions = tuple(replace(talk.questions[0], evidence=(Evidence(2 * i, "day by the sea"),)) for i in range(3, 36, 4))
    task = MemoryTask(shallow_model, BASE, [MemoryChat(talk.history, questions)])
    cuts = list(task._cuts(task._chats[0]))
    assert [i for members, _ in cuts for i in members] == list(range(9))
    sizes = task._chats[0].messages
    for members, turns in cuts:
        assert turns == sorted(set(turns)) and {piece.message // 2 for i in members for piece in questions[i].evidence} <= set(turns)
        assert sum(sizes[2 * turn] + sizes[2 * turn + 1] for turn in turns) + 16 + 64 + 64 < 512
    # evidence that no reading can hold
    everywhere = replace(talk.questions[0], evidence=tuple(Evidence(2 * i, "day") for i in range(3, 36)))
    task = MemoryTask(shallow_model, BASE, [MemoryChat(talk.history, (everywhere,))])
    assert list(task._cuts(task._chats[0])) == [] and task._expected(0)[0].weights is None


def test_nexus_tokens_are_not_counted_as_text(smollm2):
    with Model(smollm2) as model:
        nexus = nexus_for(model, None, lambda text: None)
        if nexus is None:
            pytest.skip("there are no Nexus tokens for the model")
        task = MemoryTask(model, BASE, [chat(5)], nexus)
        assert only(task.measure(0, Variant("hybrid", 0.5, "hybrid")), "survival")["late"][0] > 0.5


# The commands


def arguments(shallow_file, tmp_path, task, *more):
    return ["eval", task, "-m", str(shallow_file), "--threads", "1", "--stride", "16", "--cache", str(tmp_path / "cache"), *map(str, more)]


LOCOMO = [
    {
        "conversation": {
            f"session_{i}": [
                {"speaker": "Ada", "dia_id": f"D{i}:1", "text": f"I went to {city}, and it rained the whole day there."},
                {"speaker": "Ben", "dia_id": f"D{i}:2", "text": "That is a pity. I stayed at home and read."},
            ]
            for i, city in enumerate(("Cork", "Riga", "Lima", "Oslo"), 1)
        },
        "qa": [
            {"question": "Where did Ada go first?", "answer": "Cork", "evidence": ["D1:1"], "category": 4},
            {"question": "Where did Ada go last?", "answer": "Oslo", "evidence": ["D4:1"], "category": 1},
            {"question": "Where did Cid go?", "adversarial_answer": "Oslo", "evidence": ["D4:1"], "category": 5},
        ],
    },
]


def test_the_memory_command(shallow_file, tmp_path):
    data, out = tmp_path / "locomo.json", tmp_path / "out.json"
    data.write_text(json.dumps(LOCOMO))
    more = ("--data", data, "--policy", "streaming", "--kv-budget", 60, "--json", out)
    result = CliRunner().invoke(main, arguments(shallow_file, tmp_path, "memory", *more))
    assert result.exit_code == 0, result.stderr
    assert "1 question left out" in result.stderr and "2 of 2 measurements" in result.stderr
    whole, by_category, by_distance = result.stdout.split("\n\n")
    assert whole.splitlines()[0].split() == ["policy", "ratio", "removed", *METRICS]
    assert [line.split()[:3] for line in by_category.splitlines()] == [
        ["category", "policy", "ratio"], ["multi-hop", "full", "0"], ["multi-hop", "streaming", "0"], ["single-hop", "full", "0"],
        ["single-hop", "streaming", "0"],
    ]  # fmt: skip
    assert by_distance.startswith("distance") and "<2000" in by_distance
    document = json.loads(out.read_text())
    rows = {(row["policy"], row["metric"]): row for row in document["rows"]}
    assert document["settings"]["budget"] == 60 and document["settings"]["left_out"] == {"unanswerable": 1, "without_full_context": 0}
    assert rows["streaming", "survival@category=single-hop"]["mean"] == 0 < rows["streaming", "survival@category=multi-hop"]["mean"]
    assert rows["streaming", "choice"]["n"] == 2 and 0 < rows["streaming", "choice"]["compression"] < 1
    again = CliRunner().invoke(main, arguments(shallow_file, tmp_path, "memory", *more, "--ratio", 0.5))
    assert again.exit_code == 2 and "give one of them" in again.stderr


def test_an_interrupted_run_goes_on(shallow_file, tmp_path, monkeypatch):
    data, measure = tmp_path / "locomo.json", MemoryTask.measure
    data.write_text(json.dumps(LOCOMO))
    command = arguments(shallow_file, tmp_path, "memory", "--data", data, "--policy", "streaming,gkv", "--kv-budget", 60)

    def interrupted(self, index, variant):
        if variant.policy == "gkv":
            raise KeyboardInterrupt
        return measure(self, index, variant)

    monkeypatch.setattr(MemoryTask, "measure", interrupted)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 130 and "2 of 3 measurements" in result.stderr and result.stdout == ""
    monkeypatch.setattr(MemoryTask, "measure", measure)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and "going on after 2 measurements" in result.stderr
    assert CliRunner().invoke(main, command).stdout == result.stdout


def test_generated_conversations(shallow_file, tmp_path):
    more = ("--limit", 1, "--tokens", 1200, "--questions", 3, "--policy", "streaming", "--kv-budget", 200)
    result = CliRunner().invoke(main, arguments(shallow_file, tmp_path, "memory", *more))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("policy") and "survival" in result.stdout
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_gsm8k_command(shallow_file, tmp_path):
    data = tmp_path / "problems.jsonl"
    lines = [{"question": f"Ann has {i} pens. She buys two more. How many has she?", "answer": f"#### {i + 2}"} for i in range(3, 7)]
    data.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"question": "What is 1 + 1?", "answer": "#### 2"}]))
    more = ("--data", data, "--concat", 4, "--policy", "streaming", "--ratio", 0.5)
    result = CliRunner().invoke(main, arguments(shallow_file, tmp_path, "gsm8k", *more))
    assert result.exit_code == 0, result.stderr
    assert "1 problem left out" in result.stderr and "2 facts" in result.stdout and "survival" in result.stdout


def test_dialogues_by_task(shallow_file, tmp_path):
    data, out = tmp_path / "d.jsonl", tmp_path / "out.json"
    lines = [
        {"task": task, "method": "Role Play", "history": [{"user": "Tell me about the sea, please.", "bot": f"It is deep. {i}"},
                                                          {"user": "And lakes?", "bot": "They are smaller."}]}
        for i, task in enumerate(("GR", "AR", "GR"))
    ]  # fmt: skip
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ("--data", data, "--policy", "streaming", "--ratio", 0.3)
    command = arguments(shallow_file, tmp_path, "dialogue", *more)
    result = CliRunner().invoke(main, [*command, "--by", "task", "--json", str(out)])
    assert result.exit_code == 0, result.stderr
    assert [line.split()[:4] for line in result.stdout.split("\n\n")[1].splitlines()] == [
        ["task", "policy", "ratio", "n"], ["AR", "full", "0", "1"], ["AR", "streaming", "0.3", "1"], ["GR", "full", "0", "2"],
        ["GR", "streaming", "0.3", "2"],
    ]  # fmt: skip
    rows = {(row["policy"], row["metric"]): row for row in json.loads(out.read_text())["rows"]}
    parts = [rows["streaming", f"kl@task={task}"] for task in ("AR", "GR")]
    assert [part["n"] for part in parts] == [1, 2]
    assert rows["streaming", "kl"]["mean"] == pytest.approx((parts[0]["mean"] + 2 * parts[1]["mean"]) / 3)
    refused = CliRunner().invoke(main, [*command, "--by", "scene"])
    assert refused.exit_code == 1 and "has a field 'scene'" in refused.stderr and "they have task, method" in refused.stderr


@pytest.mark.parametrize(
    "task, more, code, sentence",
    [
        ("memory", ("--data", "none.json"), 1, "none.json cannot be read"),
        ("memory", ("--data", "none.json", "--tokens", 9), 2, "leave them or --data out"),
        ("memory", ("--kv-budget", 9), 2, "too small"),
        ("memory", ("--kv-budget", 9000), 1, "too large for a model trained on 8192"),
        ("memory", ("--talk", "none.jsonl"), 1, "none.jsonl cannot be read"),
        ("gsm8k", ("--data", "none.jsonl"), 1, "none.jsonl cannot be read"),
    ],
)
def test_wrong_usage_is_one_sentence(shallow_file, tmp_path, task, more, code, sentence):
    result = CliRunner().invoke(main, arguments(shallow_file, tmp_path, task, "--policy", "streaming", *more))
    assert (result.exit_code, result.stdout) == (code, "") and result.stderr.startswith("kvlocal: ")
    assert sentence in result.stderr and result.stderr.count("\n") == 1
