"""Long conversations with questions, without a model: the formats of LoCoMo, LongMemEval and GSM8K, generated ones, evidence, rows by group."""

import json
import random
import re

import numpy as np
import pytest

from kvlocal.cache.ledger import NEXUS, Ledger
from kvlocal.conversations.data_file import DataError
from kvlocal.conversations.dialogues import load
from kvlocal.evaluation import report
from kvlocal.evaluation.evidence import in_cache, survival
from kvlocal.evaluation.facts import load_facts
from kvlocal.evaluation.gsm8k import Problem, gsm8k_chats, load_problems, nearest
from kvlocal.evaluation.memory import DISTANCES
from kvlocal.evaluation.memory_chats import Evidence, draw_distractors
from kvlocal.evaluation.memory_data import load_memory
from kvlocal.evaluation.memory_generator import CATEGORIES, FACTS_PER_CATEGORY, memory_chats
from kvlocal.evaluation.runner import Measurement
from kvlocal.evaluation.variants import parse_all


def written(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# LoCoMo

LOCOMO = {
    "sample_id": "conv-1",
    "conversation": {
        "speaker_a": "Ada",
        "speaker_b": "Ben",
        "session_2_date_time": "9:05 am on 12 June, 2023",
        "session_2": [{"speaker": "Ben", "dia_id": "D2:1", "text": "I sold the boat.", "img_url": ["http://x.invalid"], "blip_caption": "a pier"}],
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_1": [
            {"speaker": "Ada", "dia_id": "D1:1", "text": "Hi Ben!"},
            {"speaker": "Ada", "dia_id": "D1:2", "text": "I moved to Cork."},
            {"speaker": "Ben", "dia_id": "D1:3", "text": "Nice. I bought a boat."},
        ],
    },
    "event_summary": {},
    "qa": [
        {"question": "Where did Ada move?", "answer": "Cork", "evidence": ["D1:2"], "category": 4},
        {"question": "What did Ben sell?", "answer": "the boat", "evidence": ["D1:3; D2:1", "D9:9"], "category": 1},
        {"question": "In which year?", "answer": 2023, "evidence": [], "category": 2},
        {"question": "What did Cid buy?", "evidence": ["D1:3"], "category": 5, "adversarial_answer": "a boat"},
    ],
}


def test_locomo(tmp_path):
    data = load_memory(written(tmp_path / "locomo.json", [LOCOMO]))
    (chat,) = data.chats
    # sessions in order of their numbers; what one says twice in a row is one message; an answer at the end
    assert chat.history == [
        {"role": "user", "content": "[1:56 pm on 8 May, 2023]\nAda: Hi Ben!\nAda: I moved to Cork."},
        {
            "role": "assistant",
            "content": "Ben: Nice. I bought a boat.\n[9:05 am on 12 June, 2023]\nBen: I sold the boat. [shares a picture: a pier]",
        },
    ]
    assert [(question.category, question.answer, question.lead) for question in chat.questions] == [
        ("single-hop", "Cork", ""), ("multi-hop", "the boat", ""), ("temporal", "2023", ""),
    ]  # fmt: skip
    assert chat.questions[0].evidence == (Evidence(0, "Ada: I moved to Cork."),)
    assert chat.questions[1].evidence == (Evidence(1, "Ben: Nice. I bought a boat."), Evidence(1, "Ben: I sold the boat. [shares a picture: a pier]"))
    assert chat.questions[2].evidence == ()
    assert all(piece.text in chat.history[piece.message]["content"] for question in chat.questions for piece in question.evidence)
    assert set(chat.questions[0].distractors) == {"the boat", "2023"} and data.n_unanswerable == 1


# LongMemEval


def longmemeval(number, answer, **fields):
    return {
        "question_id": f"q{number}",
        "question_type": "single-session-user",
        "question": "Where do I live?",
        "answer": answer,
        "question_date": "2023/05/30 (Tue) 23:40",
        "haystack_session_ids": ["late", "early"],
        "haystack_dates": ["2023/05/21 (Sun) 10:00", "2023/05/20 (Sat) 02:21"],
        "haystack_sessions": [
            [{"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Welcome."}, {"role": "user", "content": " "}],
            [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": f"I live in {answer}.", "has_answer": True}],
        ],
        "answer_session_ids": ["early"],
    } | fields


def test_longmemeval(tmp_path):
    unlabelled = longmemeval(2, 7)
    del unlabelled["haystack_sessions"][1][1]["has_answer"]
    records = [longmemeval(1, "Cork"), unlabelled, longmemeval("3_abs", "not said"), longmemeval(4, "Riga", question_type="multi-session")]
    data = load_memory(written(tmp_path / "long.json", records))
    first, second, third = data.chats
    assert first.history == [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "[2023/05/20 (Sat) 02:21]\nHi."},
        {"role": "user", "content": "I live in Cork.\n[2023/05/21 (Sun) 10:00]\nThanks."},
        {"role": "assistant", "content": "Welcome."},
    ]
    (question,) = first.questions
    assert question.text == "[2023/05/30 (Tue) 23:40]\nWhere do I live?" and question.evidence == (Evidence(2, "I live in Cork."),)
    # the one of its category first
    assert question.distractors == ("7", "Riga") and question.category == "single-session-user"
    # without a label for turns, all of the session that is named
    assert [piece.text for piece in second.questions[0].evidence] == ["Hi.", "I live in 7."]
    assert third.questions[0].category == "multi-session" and data.n_unanswerable == 1


@pytest.mark.parametrize(
    "value, problem",
    [
        ({"a": 1}, "is not a list of conversations"),
        ([], "holds no conversation with a question"),
        ([{"messages": []}], "conversation 1: it has neither conversation and qa"),
        ([LOCOMO, 7], "conversation 2: it has neither"),
        ([{"conversation": {"session_1": "x"}, "qa": []}], "session_1 is not a list"),
        ([{"conversation": {"session_1": [{"speaker": "A"}]}, "qa": []}], "turn 1 of session_1 has no text as text"),
        ([{"conversation": {}, "qa": []}], "its conversation has no turns"),
        ([LOCOMO | {"qa": [{"question": "a", "answer": ["b"], "category": 1}]}], "question 1 has no text as question or answer"),
        ([LOCOMO | {"qa": [{"answer": "b", "category": 1}]}], "question 1 has no text as question"),
        ([longmemeval(1, "a", haystack_sessions=[[{"role": "tool", "content": "a"}]])], "turn 1 of session 1 has the role 'tool'"),
        ([longmemeval(1, "a", haystack_sessions=[[]])], "hold no turn"),
        ([longmemeval(1, "a", question_type=None)], "it has no text as question_type"),
        ([longmemeval(1, None)], "holds no conversation with a question"),
    ],
)
def test_files_that_are_refused(tmp_path, value, problem):
    with pytest.raises(DataError, match=re.escape(problem)):
        load_memory(written(tmp_path / "data.json", value))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        load_memory(tmp_path / "none.json")
    for content in (b"{", b"\xff[]", b"[" * 100_000):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(DataError, match="is not JSON"):
            load_memory(tmp_path / "bad.json")


def test_wrong_answers_come_from_the_nearest_pool():
    found = draw_distractors(random.Random(0), "Cork", [["cork", "Oslo"], ["oslo", "Riga", "Lima"], [str(i) for i in range(50)]])
    assert len(found) == 7 and found[0] == "Oslo" and {"Riga", "Lima"} < set(found) and "oslo" not in found
    assert draw_distractors(random.Random(0), "Cork", [["Cork"]]) == ()


# GSM8K

PROBLEM = {"question": 'Mr. Yu has 3 pens. He buys "two." \n How many has he?', "answer": "3 + 2 = <<3+2=5>>5\n#### 1,005"}


def test_problems(tmp_path):
    lines = [PROBLEM, {"question": "How many?", "answer": "#### 1"}, {"question": "A. B?", "answer": "#### 0.5"}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = load_problems(path)
    assert found.problems == (Problem(("Mr. Yu has 3 pens.", 'He buys "two."'), "How many has he?", 1005),) and found.n_left_out == 2
    for line, problem in (("7", "no question and answer"), ("{", "not JSON"), ('{"question": "A. B?", "answer": "1"}', "its answer has no ####")):
        path.write_text(json.dumps(PROBLEM) + "\n" + line)
        with pytest.raises(DataError, match=f"p.jsonl, line 2: .*{problem}"):
            load_problems(path)
    path.write_text(json.dumps(lines[1]))
    with pytest.raises(DataError, match="holds no problem"):
        load_problems(path)


def test_problems_in_turns():
    problems = [Problem(tuple(f"{name} {i}." for i in range(n)), f"{name}?", n) for name, n in zip("ABCDE", (1, 2, 3, 4, 6), strict=True)]
    chats = gsm8k_chats(problems, 4, 3)
    assert [len(chat.questions) for chat in chats] == [4, 1] and gsm8k_chats(problems, 4, 3) == chats != gsm8k_chats(problems, 4, 4)
    first = chats[0]
    told = [message["content"] for message in first.history[2::2]]
    assert len(first.history) == 2 * (1 + 10) and sorted(told) != told
    for i, question in enumerate(first.questions):
        mine = [text for text in told if text.startswith(f"Problem {i + 1}: ")]
        assert mine == [f"Problem {i + 1}: {fact}" for fact in problems[i].facts] == [piece.text for piece in question.evidence]
        assert all(first.history[piece.message]["content"] == piece.text for piece in question.evidence)
        assert question.text == f"Problem {i + 1}: {problems[i].question}" and question.with_lead(question.answer) == f"#### {problems[i].answer}"
    assert [question.category for chat in chats for question in chat.questions] == [
        "1 fact", "2 facts", "3 facts", "4 or more facts", "4 or more facts",
    ]  # fmt: skip
    assert nearest(18) == ("17", "19", "16", "20") and nearest(1) == ("0", "2", "3", "4") and nearest(-1) == ("-2", "0", "-3", "1")


# Generated conversations


def count_words(messages):
    return [3, *(len(message["content"].split()) + 5 for message in messages)]


def test_generated_conversations():
    chats = memory_chats(3, 5000, 7, count_words)
    for chat in chats:
        assert 4800 <= sum(count_words(chat.history)) <= 5000
        assert [message["role"] for message in chat.history] == ["user", "assistant"] * (len(chat.history) // 2)
        assert [question.category for question in chat.questions] == [name for name in CATEGORIES for _ in range(FACTS_PER_CATEGORY)]
        joined = "\n".join(message["content"] for message in chat.history)
        places = [piece.message for question in chat.questions for piece in question.evidence]
        # all over the conversation
        assert min(places) < len(chat.history) / 4 and max(places) > len(chat.history) * 3 / 4
        assert len({question.text for question in chat.questions}) > FACTS_PER_CATEGORY * 3
        for question in chat.questions:
            said = [chat.history[piece.message] for piece in question.evidence]
            assert all(message["role"] == "user" and message["content"] == piece.text for message, piece in zip(said, question.evidence, strict=True))
            assert len(question.evidence) == (2 if question.category == "two-hop" else 1)
            assert sum(question.answer in piece.text for piece in question.evidence) == 1
            assert len({question.answer, *question.distractors}) == 4
            named = [wrong for wrong in question.distractors if re.search(rf"\b{wrong}\b", joined)]
            assert named == ([question.distractors[0]] if question.category in ("updated fact", "two-hop") else [])
            for text in (question.text, question.lead, *(piece.text for piece in question.evidence)):
                assert "{" not in text
            assert "my" not in question.lead.split()
        updated = [question for question in chat.questions if question.category == "updated fact"]
        for question in updated:
            first = next(i for i, message in enumerate(chat.history) if re.search(rf"\b{question.distractors[0]}\b", message["content"]))
            assert first < question.evidence[0].message
    assert memory_chats(1, 900, 1, count_words) == memory_chats(1, 900, 1, count_words) != memory_chats(1, 900, 2, count_words)


def test_two_hops_need_both_turns():
    (chat,) = memory_chats(1, 3000, 0, count_words)
    for question in chat.questions:
        if question.category == "two-hop":
            texts = [piece.text for piece in question.evidence]
            (naming,) = [text for text in texts if question.answer not in text]
            (telling,) = [text for text in texts if question.answer in text]
            (name,) = {word.strip(".,:") for word in naming.split()} & {word.strip(".,:") for word in telling.split()} & NAMES
            assert name not in question.text and not any(part in telling for part in re.findall(r"my (\w+)", question.text))


NAMES = set(next(topic.values for topic in load_facts().topics if topic.kind == "name"))


def test_few_questions():
    (chat,) = memory_chats(1, 900, 0, count_words)
    fewer = chat.with_questions(5, 3)
    assert len(fewer.questions) == 5 and fewer == chat.with_questions(5, 3) != chat.with_questions(5, 4) and fewer.history == chat.history
    assert [question for question in chat.questions if question in fewer.questions] == list(fewer.questions)
    assert chat.with_questions(99, 0) == chat


# Evidence


def test_evidence_in_the_cache():
    ledger = Ledger(2, 1, 16)
    ledger.begin_segment("user")
    ledger.append(np.array([5, 6, 7], np.int32))
    ledger.begin_segment("nexus")
    ledger.append(np.full(2, NEXUS, np.int32))
    ledger.begin_segment("user")
    ledger.append(np.array([8, 9], np.int32))
    # text tokens 0 1 2 3 4 are tokens 0 1 2 5 6 of the conversation
    ledger.compact(np.array([[[0, 1, 5, 6]], [[0, 3, 4, 6]]], np.intp), None)
    assert in_cache(ledger, np.array([1, 2, 3])).tolist() == [[[True, False, True]], [[False, False, False]]]


def test_survival_is_a_share_of_the_attention():
    weights = np.array([[[0.5, 0.1]], [[0.2, 0.2]]], np.float32)
    held = np.array([[[True, False]], [[False, True]]])
    assert survival(weights, held) == pytest.approx(0.7)
    assert survival(weights, np.ones_like(held)) == 1 and survival(weights, np.zeros_like(held)) == 0
    # nobody looks at it
    assert survival(np.zeros_like(weights), held) == 0.5


def test_ranges_of_distances():
    assert [DISTANCES.name(n) for n in (0, 1999, 2000, 8000, 20_000, 49_999, 50_000)] == [
        "<2000", "<2000", "2000-8000", "8000-20000", "20000-50000", "20000-50000", ">50000",
    ]  # fmt: skip


# Rows by group


class Grouped:
    name, n_chats = "grouped", 2
    metrics = ("kl", "nll", "kl@task=AR", "nll@task=AR", "kl@task=GR", "nll@task=GR")


def test_tables_by_group():
    results = {
        (spec, ratio): {
            0: Measurement(ratio, {"kl": [1.0], "kl@task=GR": [1.0], "nll": [2.0], "nll@task=GR": [2.0]}),
            1: Measurement(ratio, {"kl": [3.0], "kl@task=AR": [3.0]}),
        }
        for spec, ratio in (("full", 0.0), ("gkv", 0.5))
    }
    rows = report.rows(Grouped(), parse_all("gkv", [0.5]), results, 0)
    whole, by_task = report.tables(rows)
    assert whole[0] == ["policy", "ratio", "removed", "kl", "nll"] and len(whole[1]) == 2
    assert by_task == (
        ["task", "policy", "ratio", "n", "kl", "nll"],
        [
            ["AR", "full", "0", "1", "3.000", ""],
            ["AR", "gkv", "0.5", "1", "3.000", ""],
            ["GR", "full", "0", "1", "1.000", "2.000"],
            ["GR", "gkv", "0.5", "1", "1.000", "2.000"],
        ],
    )
    assert len(report.plain(*by_task).splitlines()) == 5


# Dialogues with labels


def test_safedialbench_loads(tmp_path):
    line = {
        "task": "Ethics", "method": "Role Play", "model_type": "ChatGPT", "scene": "Daily Life", "id": 9,
        "history": [{"user": "你好", "bot": "你好！"}, {"user": "And now?", "bot": "Nothing."}],
    }  # fmt: skip
    path = tmp_path / "ethics.jsonl"
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    (dialogue,) = load(path).dialogues
    assert dialogue.turns == (("你好", "你好！"), ("And now?", "Nothing."))
    assert dialogue.labels == {"task": "Ethics", "method": "Role Play", "model_type": "ChatGPT", "scene": "Daily Life"}
