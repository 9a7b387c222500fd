"""Tasks: rules of right answers, files of tasks, and tasks that are made from a seed."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import kvlocal.training
from kvlocal.conversations.data_file import DataError
from kvlocal.errors import KvlocalError
from kvlocal.training.task_maker import KINDS, make_tasks
from kvlocal.training.tasks import Rule, read_tasks


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        ({"contains": ["Kyoto"]}, ["Nick lives in KYOTO.", "kyoto"], ["", "Kyotos", "Tokyo"]),
        ({"contains": "New York"}, ["in New  York.", "New\nYork"], ["York New", "NewYork"]),
        ({"contains": ["a", "b"], "lacks": ["c"]}, ["b a", "A, then B"], ["a", "a b c", "a b C."]),
        ({"number": 14}, ["14", "8 + 6 = 14.", "It is 14.0", "8 and 6 are 14 stamps"], ["", "fourteen", "14 or 15", "114", "1.4", "-14"]),
        ({"number": 1200}, ["1,200 in all", "1200"], ["1,20", "200"]),
        ({"number": -2}, ["That makes -2."], ["2"]),
        ({"regex": r"Over\.\s*$"}, ["Yes. Over.", "Over.\n"], ["Over. Yes.", "over."]),
        ({"contains": ["C++"]}, ["I like C++.", "c++"], ["C"]),
    ],
)
def test_a_rule_says_which_answers_are_right(rule, right, wrong):
    found = Rule.parse(rule)
    assert [answer for answer in right if not found.holds(answer)] == []
    assert [answer for answer in wrong if found.holds(answer)] == []


GOOD = {"messages": [{"role": "user", "content": "Say yes."}], "check": {"contains": ["yes"]}}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[1]", "it has no messages or no check"),
        ("{", "it is not JSON"),
        (json.dumps(GOOD | {"check": {}}), "its check is no rule"),
        (json.dumps(GOOD | {"check": {"contain": ["x"]}}), "its check is no rule"),
        (json.dumps(GOOD | {"check": {"contains": ["x"], "python": "1"}}), "has 'python', which no rule has"),
        (json.dumps(GOOD | {"check": {"contains": []}}), "the contains of its check"),
        (json.dumps(GOOD | {"check": {"lacks": [3]}}), "the lacks of its check"),
        (json.dumps(GOOD | {"check": {"number": "3"}}), "write it without quotes"),
        (json.dumps(GOOD | {"check": {"number": True}}), "write it without quotes"),
        (json.dumps(GOOD | {"check": {"regex": "("}}), "cannot be used"),
        (json.dumps(GOOD | {"kind": 3}), "its kind is no text"),
        (json.dumps(GOOD | {"messages": []}), "it has no messages"),
        (json.dumps(GOOD | {"messages": [{"role": "user", "content": 1}]}), "the content of message 1"),
        (json.dumps(GOOD | {"messages": [*GOOD["messages"], {"role": "assistant", "content": "Yes."}]}), "its last message is not the user's"),
        (json.dumps(GOOD | {"messages": [{"role": "system", "content": "x"}]}), "its last message is not the user's"),
    ],
)
def test_a_file_with_a_bad_line_is_refused_by_the_number_of_the_line(tmp_path, line, why):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=rf"tasks\.jsonl, line 3: .*{re.escape(why)}"):
        read_tasks(path)


def test_a_file_without_tasks_is_refused(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no task"):
        read_tasks(tmp_path / "tasks.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_tasks(tmp_path / "none.jsonl")


def test_made_tasks_come_back_from_a_file(tmp_path):
    tasks = make_tasks(20, 3, "training", (60, 120))
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(task.record()) + "\n" for task in tasks))
    assert read_tasks(path).tasks == tuple(tasks)


def test_made_tasks_depend_on_the_seed_and_their_place_alone():
    tasks = make_tasks(10, 0, "training", (60, 120))
    assert make_tasks(5, 0, "training", (60, 120)) == tasks[:5]
    assert make_tasks(10, 1, "training", (60, 120)) != tasks
    assert {task.kind for task in tasks} == set(KINDS)
    assert {task.kind for task in make_tasks(4, 0, "training", (60, 120), ["sum", "copy"])} == {"sum", "copy"}
    with pytest.raises(KvlocalError, match="no kind of task 'sums'"):
        make_tasks(1, 0, "training", (60, 120), ["sums"])


def _contents(task):
    return " ".join(message["content"] for message in task.messages)


def test_made_tasks_are_as_long_as_asked_for_and_name_the_answer_before_the_question():
    for n_tokens in ((60, 120), (3000, 3000)):
        for task in make_tasks(25, 0, "held_out", n_tokens):
            length = sum(len(message["content"]) / 4.5 + 5 for message in task.messages)
            # a turn and its answer more would be too many
            assert n_tokens[0] - 60 < length < n_tokens[1] + 15
            assert task.messages[-1]["role"] == "user"
            for wanted in task.rule.contains:
                earlier = " ".join(message["content"] for message in task.messages[:-1])
                assert Rule(contains=(wanted,)).holds(earlier)
                assert not Rule(contains=(wanted,)).holds(task.messages[-1]["content"])


def test_a_corrected_fact_is_asked_for_as_it_was_told_last():
    for task in make_tasks(20, 0, "training", (60, 120), ["correction"]):
        told = _contents(task)
        assert told.index(task.rule.lacks[0]) < told.rindex(task.rule.contains[0])


def test_sums_are_right():
    for task in make_tasks(40, 0, "training", (60, 120), ["sum"]):
        total = 0
        for message in task.messages:
            if found := re.fullmatch(r"I (have|bought|gave away) (\d+) .*\.", message["content"]):
                total += int(found[2]) * (-1 if found[1] == "gave away" else 1)
        assert task.rule.number == total >= 0


def test_parts_have_no_content_in_common():
    data = tomllib.loads(Path(kvlocal.training.__file__).with_name("tasks.toml").read_text())
    assert set(data) == {"training", "held_out"}
    values = {}
    for part, lists in data.items():
        entries = [entry for listed in lists.values() for entry in listed]
        texts = [text for entry in entries for text in (entry if isinstance(entry, list) else [entry])]
        values[part] = {re.sub("^an? ", "", text.casefold()) for text in texts}
    assert not values["training"] & values["held_out"]
