"""A batch answers what is unanswered, each conversation for itself, whatever decodes beside it; neither a bad line nor a kill costs any other."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from doors import write_chat_model

from kvlocal.batch.line import Failure, Line, LineError, Result
from kvlocal.batch.run import run_batch
from kvlocal.cache.ledger import Ledger
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams

# One thread: two would wait for each other wherever the cores are shared.
SMALL = SessionConfig(budget=128, stride=32, n_ubatch=64, n_threads=1, max_tokens=8, sampling=SamplingParams(temperature=0, seed=0))


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as m:
        yield m


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def line(*messages, **others):
    return json.dumps(others | {"messages": list(messages)}).encode() + b"\n"


def run(model, *lines, parallel=1, ordered=False, **changes):
    """What becomes of each line."""
    return list(run_batch(iter(lines), model, dataclasses.replace(SMALL, **changes), parallel=parallel, ordered=ordered))


def same(one, other):
    """Whether two results are of the same conversation, up to the time it took."""
    return (one.id, one.messages, one.stop_reasons, one.kv, one.seed) == (other.id, other.messages, other.stop_reasons, other.kv, other.seed)


def parse(text):
    return Line.parse(7, text.encode())


# Lines


@pytest.mark.parametrize(
    "text, problem",
    [
        ("hello", "not JSON .* column 1"),
        ('{"messages": [', "not JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "no messages"),
        ("7", "no messages"),
        ('{"id": 1}', "no messages"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": "hi"}', "not a list"),
        ('{"id": [1], "messages": [{"role": "user", "content": "a"}]}', "id is not a scalar"),
        ('{"id": NaN, "messages": [{"role": "user", "content": "a"}]}', "NaN"),
        ('{"id": 1e999, "messages": [{"role": "user", "content": "a"}]}', "1e999"),
        ('{"messages": ["hi"]}', "message 1 is not an object"),
        ('{"messages": [{"role": "oracle", "content": "a"}]}', 'message 1 has the role "oracle"'),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "message 1 is of a tool that was not called"),
        ('{"messages": [{"content": "a"}]}', "message 1 has the role null"),
        ('{"messages": [{"role": "' + "x" * 5000 + '", "content": "a"}]}', "message 1 has the role"),
        ('{"id": ' + "9" * 5000 + '}', "cannot be read as JSON"),
        ('{"messages": [{"role": {"a": 1}, "content": "a"}]}', "message 1 has the role"),
        ('{"messages": [{"role": "user"}]}', "content of message 1"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": ["b"]}]}', "content of message 2"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}', "message 2 is a system"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 1 answers nothing"),
        ('{"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "a"}]}', "message 2 answers nothing"),
        ('{"messages": [{"role": "user", "content": "a"}], "max_tokens": "8"}', 'max_tokens is "8": give a whole number'),
        ('{"messages": [{"role": "user", "content": "a"}], "seed": 1.5}', "seed is 1.5"),
        ('{"messages": [{"role": "user", "content": "a"}], "kv_budget": true}', "kv_budget is true"),
        ('{"messages": [{"role": "user", "content": "a"}], "temperature": [0]}', "temperature is .0.: give a number"),
        ('{"messages": [{"role": "system", "content": "a"}], "system": "b"}', "a system prompt and a system message"),
    ],
)
def test_a_bad_line_is_one_sentence(text, problem):
    with pytest.raises(LineError, match=problem) as caught:
        parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_bytes_that_are_no_text():
    with pytest.raises(LineError, match="not UTF-8"):
        Line.parse(1, b'{"messages": [{"role": "user", "content": "\xff"}]}')


@pytest.mark.parametrize("identity", ["é", 0, -1.5, True, None])
def test_ids(identity):
    job = Line.parse(7, b"\xef\xbb\xbf" + line(user("a"), id=identity, note="is left out"))
    assert job.id == identity and type(job.id) is type(identity)


def test_the_line_number_is_the_id_of_a_line_without():
    assert Line.parse(7, line(user("a"))).id == 7


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        (b'{"id": "x"}', "x"),
        (b'{"messages": []}', 7),
        (b'{"id": 0, "messages": []}', 0),
        (b'\xef\xbb\xbf{"id": "x", "messages": "hi"}\r\n', "x"),
        (b'{"id": "x", "messages": [{"role": "king", "content": "a"}]}', "x"),
        (b'{"id": "x", "messages": [{"role": "user", "content": "a"}], "seed": "b"}', "x"),
        (b'{"id": "x", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "x"),
        (b'{"id": "x", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "x"),
        (b'{"id": "x", "messages": [{"role": "user", "content": "\xff"}]}', "x"),
        (b'{"id": "\xff", "messages": [{"role": "user", "content": "a"}]}', None),
        (b'{"id": NaN, "messages": [{"role": "user", "content": "a"}]}', None),
        (b'{"id": [1], "messages": [{"role": "user", "content": "a"}]}', None),
        (b'{"id": "x", "messages": [', None),
        (b"[]", None),
    ],
)
def test_a_refused_line_keeps_its_id(text, identity):
    """Never a number that nobody gave it, which can be the id of another line."""
    with pytest.raises(LineError) as caught:
        Line.parse(7, text)
    assert caught.value.id == identity and type(caught.value.id) is type(identity)


def test_what_is_unanswered():
    turns = [system("s"), user("a"), user("b"), assistant("c"), user("d"), user("e")]
    assert Line.parse(1, line(*turns)).unanswered == [1, 4, 5]
    assert Line.parse(1, line(*turns)).system == "s"
    assert Line.parse(1, line(*turns[1:4])).system is None
    assert Line.parse(1, line(*turns[2:4])).unanswered == []
    assert Line.parse(1, line(turns[0])).unanswered == []


def test_options():
    job = Line.parse(1, line(user("a"), max_tokens=3, temperature=0, seed=4, system="s", policy="h2o", kv_budget=99, other=1))
    config = SessionConfig(policy="gkv", policy_args={"alpha": 0.5})
    granted = job.configure(config)
    sampling = SamplingParams(temperature=0, seed=4)
    assert granted == dataclasses.replace(config, max_tokens=3, sampling=sampling, system="s", policy="h2o", policy_args={}, budget=99)
    assert Line.parse(1, line(user("a"), seed=None, policy="gkv")).configure(config) == config
    asked_for = dataclasses.replace(config, sampling=SamplingParams(repeat_penalty=1.3))
    assert job.configure(asked_for).sampling.repeat_penalty == 1.3


def test_options_that_sample():
    asked = {"top_k": 3, "dry_multiplier": 0.5, "dry_base": 2, "dry_allowed_length": 4, "dry_penalty_last_n": 9, "xtc_probability": 0.5,
             "xtc_threshold": 0.2, "presence_penalty": 1, "frequency_penalty": -1}  # fmt: skip
    job = Line.parse(1, line(user("a"), dry_sequence_breakers=["x"], logit_bias={"17": -100}, **asked))
    expected = SamplingParams(dry_sequence_breakers=("x",), logit_bias={17: -100}, **asked)
    assert job.configure(SessionConfig()).sampling == expected


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"dry_multiplier": "much"}, "dry_multiplier"),
        ({"dry_sequence_breakers": [1]}, "dry_sequence_breakers"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"xtc_probability": 3}, "xtc_probability"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 30}, "top_logprobs"),
    ],
)
def test_options_that_are_wrong_in_one_sentence(option, words):
    with pytest.raises(KvlocalError, match=words) as caught:
        Line.parse(1, line(user("a"), **option)).configure(SessionConfig())
    assert "\n" not in str(caught.value)


# Answers


def test_log_probabilities_of_each_answer(model):
    question = line(user("What is the capital of France?"), user("And of Spain?"), logprobs=True, top_logprobs=2, max_tokens=5)
    asked, plain = run(model, question, line(user("Hello")), ordered=True)
    assert plain.logprobs is None and "logprobs" not in plain.record()
    chances = asked.record()["logprobs"]
    assert len(chances) == 2
    for answer, text in zip(chances, (asked.messages[1], asked.messages[3]), strict=True):
        assert b"".join(bytes(token["bytes"]) for token in answer["content"]).decode().startswith(text["content"])
        assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in answer["content"])


def test_every_open_turn_is_answered_in_order(model):
    questions = ["What is the capital of France?", "Say that again, louder."]
    (result,) = run(model, line(*map(user, questions), id="x"))
    with ChatSession(model, SMALL) as chat:
        for question in questions:
            "".join(chat.send(question))
        assert result.messages == chat.messages
        assert result.kv == {name: getattr(chat.kv, name) for name in result.kv}
    assert [message["role"] for message in result.messages] == ["user", "assistant"] * 2
    assert result.id == "x" and result.stop_reasons == ["length", "length"] and result.recalled == [[], []]
    timings = result.timings
    assert timings["answer_tokens"] == 16
    assert timings["prompt_tokens"] + 16 == result.kv["history_tokens"]
    assert timings["seconds"] == pytest.approx(timings["prompt_seconds"] + timings["answer_seconds"], abs=1e-3)
    assert timings["tokens_per_second"] == pytest.approx(16 / timings["answer_seconds"], rel=0.05)


def test_the_turns_that_were_recalled_for_each_answer(model):
    """As in a chat, also of conversations that decode together."""
    questions = [f"Question {i}: name some things that start with the letter {letter}, and say why." for i, letter in enumerate("abcd")]
    recall = {"policy": "recall", "archive": "ram", "budget": 96, "max_tokens": 20}
    one, other = run(model, line(*map(user, questions)), line(*map(user, questions[:1])), parallel=2, ordered=True, **recall)
    with ChatSession(model, dataclasses.replace(SMALL, **recall)) as chat:
        recalled = []
        for question in questions:
            "".join(chat.send(question))
            recalled.append(chat.last.recalled)
        assert one.messages == chat.messages
    assert one.recalled == recalled and recalled[0] == [] and recalled[-1] and other.recalled == [[]]
    assert one.record()["recalled"] == recalled


def test_given_answers_are_taken_as_they_are(smollm2):
    turns = [user("Name a colour."), assistant("Umbra, of course."), user("Which one did you name?")]
    with Model(smollm2) as model:
        (result,) = run(model, line(*turns))
        with ChatSession(model, SMALL) as chat:
            chat.restore(turns)
            answer = "".join(chat.answer())
        assert result.messages == [*turns, assistant(answer)]
        (other,) = run(model, line(turns[0], assistant("Teal."), turns[2]))
        assert other.messages[-1] != result.messages[-1]


def test_what_follows_the_last_open_turn_stays(model):
    turns = [user("Hi"), user("And you?"), assistant("Fine.")]
    (result,) = run(model, line(*[turn | {"note": "left out"} for turn in turns]))
    assert result.messages[0] == turns[0] and result.messages[1]["role"] == "assistant"
    assert result.messages[2:] == turns[1:]


@pytest.mark.parametrize("turns", [[user("Hi"), assistant("Hello")], [system("Be brief.")]])
def test_a_conversation_with_nothing_to_answer_is_unchanged(model, turns):
    (result,) = run(model, line(*turns), budget=None)
    assert result.messages == turns and result.stop_reasons == []
    assert result.kv["budget"] > 0 and result.kv["history_tokens"] == 0
    assert result.timings["answer_tokens"] == 0


def test_the_system_prompt_of_the_line_or_of_the_configuration(model):
    own, none = line(system("Speak like a pirate."), user("Hi")), line(user("Hi"))
    first, second = run(model, own, none, system="Answer in French.")
    assert first.messages[0] == system("Speak like a pirate.")
    assert second.messages[0] == user("Hi")
    (pirate,) = run(model, none, system="Speak like a pirate.")
    assert first.messages[1:] == pirate.messages
    assert first.kv == pirate.kv != second.kv


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_chat_model(path)
    with Model(path) as loaded:
        yield loaded


def test_lines_with_another_policy_do_not_disturb_the_others(tiny):
    """How many queries are recorded is decided once for all, when the context is made."""
    lines = [
        line(*(user(f"The keeper counted {i} ships. " * (3 + i % 3)) for _ in range(4)), id=i, **({"policy": "snapkv"} if i < 7 else {}))
        for i in range(12)
    ]
    alone = run(tiny, *lines, policy="kvzip-snapkv", budget=64, n_ubatch=32)
    beside = run(tiny, *lines, policy="kvzip-snapkv", budget=64, n_ubatch=32, parallel=4, ordered=True)
    assert [type(result) for result in beside] == [Result] * 12
    assert all(same(one, other) for one, other in zip(alone, beside, strict=True))
    assert all(result.kv["compressions"] > 1 for result in alone)


def test_lines_that_fail_at_once_give_their_slots_back(tiny, monkeypatch):
    """Those after them decode in the context that is shared, and not in one of their own each."""
    made, init = [], Context.__init__
    monkeypatch.setattr(Context, "__init__", lambda context, *args, **options: (init(context, *args, **options), made.append(context))[0])
    lines = [line(user("Hi"), system="word " * 200), line(user("Hi"), system="word " * 200), *(line(user(f"Hello {i}")) for i in range(6))]
    results = run(tiny, *lines, policy="snapkv", budget=64, n_ubatch=32, parallel=2, ordered=True)
    assert [type(result) for result in results] == [Failure] * 2 + [Result] * 6
    # one to try the configuration, and the one that is shared
    assert len(made) == 2


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0, seed=0), SamplingParams(temperature=1.5, seed=11)])
def test_results_do_not_depend_on_the_order_of_lines(model, sampling):
    long = " ".join(f"Item {i} costs {i * 7 % 23} coins." for i in range(30))
    lines = [
        line(user("Tell me about whales."), user("More."), id=1),
        line(user(long + " Which is the cheapest?"), id=2),
        line(system("Be rude."), user("Tell me about whales."), id=3),
    ]
    forwards, backwards = run(model, *lines, sampling=sampling), run(model, *lines[::-1], sampling=sampling)
    assert forwards[1].kv["compressions"] > 0
    for one, other in zip(forwards, backwards[::-1], strict=True):
        assert (one.id, one.messages, one.kv, one.seed) == (other.id, other.messages, other.kv, other.seed)


def test_without_a_seed_equal_lines_are_drawn_anew(model):
    lines = [line(user("Hi"), id=i) for i in range(2)]
    first, second = run(model, *lines, sampling=SamplingParams(temperature=1.0), max_tokens=1)
    assert first.seed != second.seed
    (again,) = run(model, lines[1], sampling=SamplingParams(temperature=1.0, seed=second.seed), max_tokens=1)
    assert again.messages == second.messages


def test_a_document_many_times_the_budget(model):
    document = "\n".join(f"On day {i} the keeper counted {i * 13 % 47} ships and {i % 9} gulls off the cape." for i in range(70))
    (result,) = run(model, line(user(document + "\n\nHow many ships on day 3?"), user("And on day 69?")), budget=256, n_ubatch=128)
    assert result.kv["history_tokens"] > 5 * 256
    assert 256 < result.kv["peak_cells"] <= 256 + SMALL.stride
    assert result.kv["compressions"] > 5
    assert result.kv["evicted"] >= result.kv["history_tokens"] - 256 - SMALL.stride
    assert len(result.messages) == 4


def test_lines_that_fail_are_numbered_and_the_others_go_on(model):
    too_long = line(system("Never ever forget this. " * 40), user("Hi"))
    failing = [b"what?\n", b"\n", line(user("Hi"), id="ok"), too_long, line(user("Hi"))[:-9]]
    outcomes = run(model, *failing, line(user("Hi"), id="last"))
    assert [outcome.number for outcome in outcomes] == [1, 3, 4, 5, 6]
    assert [outcome.number for outcome in outcomes if isinstance(outcome, Failure)] == [1, 4, 5]
    assert "the system prompt takes" in str(outcomes[2].error)
    assert outcomes[1].messages == outcomes[4].messages


def test_options_that_fail_concern_their_line_only(model):
    asked = [{"policy": "magic"}, {"policy": "nexus"}, {"kv_budget": 3}, {"kv_budget": 10**9}, {"max_tokens": 0}]
    asked += [{"temperature": -1}, {"temperature": 10**400}, {"seed": -1}]
    outcomes = run(model, *[line(user("Hi"), **wish) for wish in asked], line(user("Hi"), id="last"), parallel=3, ordered=True)
    assert all(isinstance(outcome, Failure) for outcome in outcomes[:-1])
    assert outcomes[-1].id == "last"


def test_options_are_what_a_session_of_their_own_would_do(model):
    text = " ".join(f"Item {i} costs {i * 7 % 23} coins." for i in range(16))
    wishes = [
        {"max_tokens": 3},
        {"temperature": 1.2, "seed": 5},
        {"system": "Be rude."},
        # these two do not fit a slot of the command's settings
        {"kv_budget": 700},
        {"policy": "h2o"},
        {"policy": "full", "kv_budget": 2048},
        {"policy": "streaming", "kv_budget": 64},
    ]
    lines = [line(user(text), user("Which is the cheapest?"), id=i, **wish) for i, wish in enumerate(wishes)]
    together = run(model, *lines, parallel=4, ordered=True, policy="snapkv")
    for job, result in zip((Line.parse(i, text) for i, text in enumerate(lines)), together, strict=True):
        config = job.configure(dataclasses.replace(SMALL, policy="snapkv"))
        with ChatSession(model, config) as chat:
            for message in job.messages:
                "".join(chat.send(message["content"]))
            assert result.messages == chat.messages
            assert result.kv == chat.kv.report()
    assert [result.kv["budget"] for result in together] == [128, 128, 128, 700, 128, 2048, 64]
    assert together[2].messages[0] == user(text)


def test_slots_that_cannot_be_made_fail_before_the_first_line(model, monkeypatch):
    def too_large(*arguments, **options):
        raise KvlocalError("a cache of 64 x 256 cells cannot be made")

    monkeypatch.setattr("kvlocal.chat.beside.Slots", too_large)
    with pytest.raises(KvlocalError, match="64 x 256"):
        run_batch([line(user("Hi"))], model, SMALL, parallel=64)


def test_a_configuration_that_cannot_work_fails_before_the_first_line(model):
    def lines():
        raise AssertionError("read")
        yield

    with pytest.raises(KvlocalError, match="too large"):
        run_batch(lines(), model, dataclasses.replace(SMALL, budget=100_000))


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_line_is_read_before_there_is_place_for_it(model, parallel):
    taken = []

    def lines():
        for i in range(1_000_000):
            taken.append(i)
            yield line(user("Hi"), assistant("Hello"))

    outcomes = run_batch(lines(), model, SMALL, parallel=parallel)
    assert taken == []
    for n in range(1, 20):
        assert isinstance(next(outcomes), Result)
        assert n <= len(taken) <= n + parallel - 1
    outcomes.close()


def test_a_slow_conversation_holds_back_so_many(model, monkeypatch):
    monkeypatch.setattr("kvlocal.batch.run.HELD_BACK", 4)
    taken = []

    def lines():
        yield line(user("Tell me a story."), max_tokens=40)
        for i in range(1_000_000):
            taken.append(i)
            yield line(user("Hi"), assistant("Hello"))

    outcomes = run_batch(lines(), model, SMALL, parallel=2, ordered=True)
    assert next(outcomes).number == 1
    # one place is for the slow one
    assert len(taken) == 5
    assert [next(outcomes).number for _ in range(9)] == list(range(2, 11))
    outcomes.close()


# Together


def conversations(n):
    """Long and short ones, some of which are compressed on the way."""
    for i in range(n):
        text = " ".join(f"Item {k} costs {(k * 7 + i) % 23} coins." for k in range(10 * (i % 3)))
        yield line(user(f"{text} What about {i}?"), user("Go on."), id=i)


# KVzip reads twice, H2O records every query, G-KV scores by the last ones
@pytest.mark.parametrize("policy", ["gkv", "h2o", "kvzip-snapkv"])
def test_a_conversation_is_answered_as_alone(model, policy):
    alone = run(model, *conversations(6), policy=policy)
    together = run(model, *conversations(6), policy=policy, parallel=3)
    assert sum(result.kv["compressions"] for result in alone) >= 4
    # llama.cpp computes the rows of this model's matrices one by one, so that not even the last bit differs
    for one, other in zip(alone, sorted(together, key=lambda result: result.number), strict=True):
        assert same(one, other)


def test_sampled_answers_are_those_of_their_seed(model):
    sampling = SamplingParams(temperature=1.0, seed=3)
    alone, together = (run(model, *conversations(6), sampling=sampling, parallel=n, ordered=True) for n in (1, 3))
    assert all(map(same, alone, together))


def test_a_model_with_a_sliding_window(short_gemma3):
    with Model(short_gemma3) as model:
        settings = {"budget": 256, "max_tokens": 6}
        alone = run(model, *conversations(4), **settings)
        together = run(model, *conversations(4), parallel=2, ordered=True, **settings)
        for one, other in zip(alone, together, strict=True):
            # two rows of a product may be rounded otherwise than one, so that words can differ
            assert [message["role"] for message in one.messages] == [message["role"] for message in other.messages]
            assert other.kv["peak_cells"] <= 256 + SMALL.stride


def test_in_the_order_of_completion_or_of_the_lines(model):
    lines = [line(user("Tell me a story."), id="slow", max_tokens=30), *(line(user("Hi"), id=i, max_tokens=1) for i in range(4))]
    assert run(model, *lines, parallel=2)[-1].id == "slow"
    assert [outcome.id for outcome in run(model, *lines, parallel=2, ordered=True)] == ["slow", 0, 1, 2, 3]


def test_a_long_text_does_not_keep_the_others_waiting(model):
    """While one conversation reads 12 micro-batches, the other ones go on by a token each time."""
    lines = [line(user("word " * 12 * 64), id="long"), *(line(user(f"Hi {i}"), id=i, max_tokens=3) for i in range(2))]
    outcomes = run(model, *lines, parallel=3, max_tokens=1)
    assert [outcome.id for outcome in outcomes][-1] == "long"


def test_an_error_where_the_lines_come_from_ends_the_batch(model):
    def lines():
        yield line(user("Hi"))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        list(run_batch(lines(), model, SMALL, parallel=2))


def test_an_abandoned_batch_leaves_no_thread_and_no_cache(model):
    n = threading.active_count()
    outcomes = run_batch(conversations(9), model, SMALL, parallel=3)
    next(outcomes)
    outcomes.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > n and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == n
    assert all(context.closed for context in model.contexts)


@pytest.mark.parametrize("close", [True, False])
def test_a_batch_that_never_began_leaves_no_cache(tiny, close):
    gc.collect()
    gc.disable()
    try:
        outcomes = run_batch(conversations(3), tiny, SMALL, parallel=2)
        assert not all(context.closed for context in tiny.contexts)
        if close:
            outcomes.close()
        else:
            del outcomes
        assert all(context.closed for context in tiny.contexts)
    finally:
        gc.enable()


def test_conversations_that_are_done_take_no_memory(model):
    gc.collect()  # what other tests left
    before = sum(isinstance(thing, Ledger) for thing in gc.get_objects())
    for outcome in run(model, *[line(user("word " * 150))] * 3, max_tokens=1):
        assert outcome.kv["compressions"] > 0
    assert sum(isinstance(thing, Ledger) for thing in gc.get_objects()) == before


def test_poll_ends_the_batch_in_the_middle_of_an_answer_and_of_a_text(model):
    class Enough(Exception):
        pass

    for content, limit in (("Tell me a story.", 3), ("word " * 400, 4)):
        left = iter(range(limit))

        def poll(left=left):
            if next(left, None) is None:
                raise Enough

        with pytest.raises(Enough):
            list(run_batch([line(user(content))], model, SMALL, poll=poll))


# The command


def command(model: Path, *arguments) -> list[str]:
    small = ["--temp", "0", "--max-tokens", "2", "--kv-budget", "128", "--threads", "1"]
    return [sys.executable, "-m", "kvlocal_cli", "batch", "-m", str(model), *small, *map(str, arguments)]


def write_many(path: Path, n: int) -> Path:
    path.write_bytes(b"".join(line(user(f"Hi {i}"), id=i) for i in range(n)))
    return path


def records_of(path):
    return [json.loads(part) for part in path.read_bytes().split(b"\n")[:-1]]


def test_command(smollm2, tmp_path):
    given = [line(user("Hello"), user("Again")), b'{"id": "no"}\n', b"\n", line(user("Grüße 👋"), id="é"), b"nonsense"]
    (tmp_path / "in.jsonl").write_bytes(b"".join(given))
    done = subprocess.run(command(smollm2, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl"), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    told = done.stderr.splitlines()
    assert told[0].startswith("kvlocal: line 2: it has no messages") and told[1].startswith("kvlocal: line 5: it is not JSON")
    # two tokens are less than the character that the third answer begins with, so that nothing of it is left
    assert "2 done, 2 failed, 4 tokens written" in told[-1] and "Traceback" not in done.stderr
    records = records_of(tmp_path / "out.jsonl")
    assert [record["line"] for record in records] == [1, 2, 4, 5]
    assert [record["id"] for record in records] == [1, "no", "é", None]
    assert records[1]["error"].startswith("it has no messages") and set(records[1]) == {"line", "key", "id", "error"}
    assert [message["role"] for message in records[0]["messages"]] == ["user", "assistant", "user", "assistant"]
    assert records[2]["messages"][0] == user("Grüße 👋")
    for record in records[::2]:
        assert set(record) == {"line", "key", "id", "messages", "stop_reasons", "recalled", "seed", "kv", "timings"}
        assert set(record["kv"]) == {"budget", "peak_cells", "history_tokens", "compressions", "evicted", "nexus"}
        assert record["kv"]["budget"] == 128

    again = subprocess.run(
        command(smollm2, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--retry"), capture_output=True, text=True
    )
    assert again.returncode == 1 and "line 2: it has no messages" in again.stderr and "line 5: it is not JSON" in again.stderr
    assert records_of(tmp_path / "out.jsonl") == [records[i] for i in (0, 2, 1, 3)]

    piped = subprocess.run(command(smollm2, "-", "--parallel", "2"), input=given[3], capture_output=True)
    assert piped.returncode == 0
    assert json.loads(piped.stdout)["messages"] == records[2]["messages"]


def test_refused_before_anything_is_touched(short_smollm2, tmp_path):
    source = write_many(tmp_path / "in.jsonl", 1)
    (tmp_path / "out.jsonl").write_text("precious\n")
    for arguments, code, sentence in [
        (["-o", tmp_path / "out.jsonl"], 1, "holds something else"),
        (["-o", source, "--force"], 2, "is the input"),
        (["-o", tmp_path / "new.jsonl", "--kv-budget", "100000"], 1, "too large"),
    ]:
        done = subprocess.run(command(short_smollm2, source, *arguments), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, "") and sentence in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"
    assert source.stat().st_size > 0
    assert not (tmp_path / "new.jsonl").exists()


def test_the_same_command_goes_on_where_it_stopped(short_smollm2, tmp_path):
    source, out = write_many(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    run_again = command(short_smollm2, source, "-o", out, "--parallel", "2", "--ordered", "--seed", "0")
    assert subprocess.run(run_again).returncode == 0
    parts = out.read_bytes().splitlines(keepends=True)
    # two lines, and a torn one
    out.write_bytes(b"".join(parts[:2]) + parts[2][:40])
    done = subprocess.run(run_again, capture_output=True, text=True)
    assert done.returncode == 0 and "going on behind 2 lines" in done.stderr and "3 done" in done.stderr
    assert out.read_bytes().startswith(b"".join(parts[:2]))
    strip = [{name: value for name, value in record.items() if name != "timings"} for record in records_of(out)]
    assert strip == [{name: value for name, value in json.loads(part).items() if name != "timings"} for part in parts]
    done = subprocess.run(run_again, capture_output=True, text=True)
    assert done.returncode == 0 and "0 done" in done.stderr
    before = out.read_bytes()
    for change in (["--temp", "1"], ["--system", "Be brief."]):
        done = subprocess.run([*run_again, *change], capture_output=True, text=True)
        assert done.returncode == 1 and "with these settings" in done.stderr and "Traceback" not in done.stderr
    source.write_bytes(source.read_bytes().replace(b"Hi 0", b"Ho 0"))
    assert subprocess.run(run_again, capture_output=True).returncode == 1
    assert out.read_bytes() == before
    assert subprocess.run([*run_again, "--force"], capture_output=True).returncode == 0
    assert records_of(out)[0]["messages"][0] == user("Ho 0")


def test_a_kill_costs_no_conversation(short_smollm2):
    script = Path(__file__).parent / "measure" / "kill_batch.py"
    arguments = ["3", "--model", short_smollm2, "--lines", "12", "--parallel", "3", "--threads", "1"]
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == 3
    assert (result["lost"], result["doubled"], result["answers_that_differ"]) == (0, 0, 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle(short_smollm2, tmp_path, number):
    source, out = write_many(tmp_path / "in.jsonl", 1000), tmp_path / "out.jsonl"
    process = subprocess.Popen(command(short_smollm2, source, "-o", out), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    content = out.read_bytes()
    assert content.endswith(b"\n")
    ids = [json.loads(part)["id"] for part in content.splitlines()]
    assert ids == list(range(len(ids))) and 2 <= len(ids) < 1000
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert told.startswith(f"kvlocal: interrupted, {len(ids)} done") and told.count("\n") == 1


def test_ctrl_c_while_waiting_for_a_line(short_smollm2, tmp_path):
    process = subprocess.Popen(command(short_smollm2, "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(line(user("Hi"), id="first"))
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["id"] == "first"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and b"interrupted, 1 done" in told


def test_nobody_reads_the_results(short_smollm2, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    source = write_many(tmp_path / "in.jsonl", 5)
    done = subprocess.run(command(short_smollm2, source), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_what_answers_of_a_line_are_asked_for() -> None:
    def parse(**options: object) -> Line:
        return Line.parse(1, json.dumps({"messages": [{"role": "user", "content": "Hi"}], **options}).encode())

    schema = {"type": "object"}
    line = parse(
        stop="x", tool_choice={"type": "function", "function": {"name": "f"}}, top_p=0.5,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )  # fmt: skip
    assert line.asked.stop == ("x",) and line.asked.json_schema == schema
    assert (line.asked.tool_choice, line.asked.allowed_tools) == ("required", ("f",))
    assert line.configure(SessionConfig()).sampling.top_p == 0.5
    wrong = (
        {"stop": [1]}, {"stop": ""}, {"tool_choice": "perhaps"}, {"tool_choice": {}}, {"response_format": {"type": "xml"}}, {"n": 2},
        {"max_completion_tokens": 5}, {"tools": {}}, {"top_p": "0.5"},
    )  # fmt: skip
    for options in wrong:
        with pytest.raises(LineError):
            parse(**options)
    with pytest.raises(KvlocalError, match="tool 1"):
        parse(tools=["f"]).configure(SessionConfig())


def test_results_of_tools_are_answered_with_what_follows_them() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [{"role": "user", "content": "Hi"}, answer, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    both = messages, [*messages, {"role": "user", "content": "So?"}]
    asked = [Line.parse(1, json.dumps({"messages": each}).encode()).unanswered for each in both]
    assert asked == [[3], [4]]
