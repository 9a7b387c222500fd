"""An engine answers requests side by side, each in its conversation, and reads only what is new."""

import ast
import dataclasses
import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gguf_copy import Source, copy

from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal.chat.cache_map import CacheMap
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.messages import canonical
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.session import ChatSession
from kvlocal.chat.text_session import TextSession
from kvlocal.conversations.archive_file import ArchiveFile
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.llama.slots import Slot
from kvlocal.serving.chain import owner_digest
from kvlocal.serving.engine import Engine
from kvlocal.serving.record import Record
from kvlocal.serving.request import NEW, AnswerRequest, EngineBusy, Finished, TextRequest, UnknownConversation
from kvlocal.serving.shown_map import ShownMap

GREEDY = SamplingParams(temperature=0)
CONFIG = SessionConfig(budget=256, stride=64, n_ubatch=64, policy="recall", archive="ram", n_threads=1, sampling=GREEDY, max_tokens=8)
SYSTEM = {"role": "system", "content": "You are the keeper of a lighthouse."}
LONG = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. "


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as loaded:
        yield loaded


@pytest.fixture
def engine(model):
    with Engine(model, CONFIG, parallel=2, waiting=2) as engine:
        yield engine


def ask(engine, *messages, owner="me", **options):
    return engine.submit(AnswerRequest(owner, messages, options=AnswerOptions(**options)))


def finished(answering):
    *pieces, last = answering.events()
    assert isinstance(last, Finished) and all(isinstance(piece, AnswerPiece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == last.message["content"]
    return last


def answer(engine, *messages, **options):
    last = finished(ask(engine, *messages, **options))
    assert last.error is None, last.error
    return last


def test_an_answer_is_that_of_a_session_alone(model, engine):
    with ChatSession(model, CONFIG) as alone:
        alone.set_system(SYSTEM["content"])
        expected = "".join(alone.send("Which ships came by?"))
        n_tokens = alone.kv.history_tokens
    last = answer(engine, SYSTEM, user("Which ships came by?"))
    assert (last.message, last.stop_reason) == ({"role": "assistant", "content": expected}, "length")
    assert last.usage.completion_tokens == 8 and last.usage.prompt_tokens == n_tokens - 8


def test_what_cannot_be_answered_is_refused(engine):
    with pytest.raises(Exception, match="no turn to answer"):
        ask(engine, user("Hello"), {"role": "assistant", "content": "Hi"})


def test_too_many_requests_are_told_when_to_come_again(engine):
    running = [ask(engine, user(LONG * 20), max_tokens=400) for _ in range(4)]
    with pytest.raises(EngineBusy) as error:
        ask(engine, user("Hello"))
    assert error.value.retry_after >= 1
    for one in running:
        one.cancel()
    assert {finished(one).stop_reason for one in running} == {"stopped"}
    assert answer(engine, user("Hello")).stop_reason == "length"


def test_a_request_that_is_cancelled_stops_soon(engine):
    answering = ask(engine, user(LONG * 200), max_tokens=4000)
    time.sleep(0.3)
    started = time.perf_counter()
    answering.cancel()
    last = finished(answering)
    assert last.stop_reason == "stopped" and last.error is None and time.perf_counter() - started < 2


def test_events_come_to_a_listener_that_comes_late(engine):
    answering = ask(engine, user("Hello"))
    found, done = [], threading.Event()
    time.sleep(0.2)
    answering.on_event(lambda event: (found.append(event), isinstance(event, Finished) and done.set()))
    assert done.wait(20) and "".join(piece.text for piece in found[:-1]) == found[-1].message["content"]


def test_a_conversation_that_is_too_large_concerns_no_other(engine):
    beside = ask(engine, user("Hello"))
    last = finished(ask(engine, {"role": "system", "content": LONG * 50}, user("Hello")))
    assert "the system prompt takes" in str(last.error) and last.stop_reason == "error"
    assert finished(beside).stop_reason == "length"


def test_closing_ends_what_runs_and_what_waits(model):
    engine = Engine(model, CONFIG, parallel=1, waiting=2)
    running, waiting = ask(engine, user("Hello"), max_tokens=4000), ask(engine, user("Hello"))
    time.sleep(0.5)
    engine.close()
    engine.close()
    assert finished(running).stop_reason == "stopped" and "closing" in str(finished(waiting).error)
    with pytest.raises(Exception, match="closing"):
        ask(engine, user("Hello"))


# which conversation it is


def said(last):
    return {"role": "assistant", "content": last.message["content"]}


def n_read(last):
    return last.usage.prompt_tokens - last.usage.cached_tokens


def chat(engine, *texts, history=(SYSTEM,), **options):
    """Asks one text after another; the messages, and what became of each."""
    messages, results = list(history), []
    for text in texts:
        messages.append(user(text))
        results.append(answer(engine, *messages, **options))
        messages.append(said(results[-1]))
    return messages, results


@pytest.fixture(scope="module")
def n_tokens(model):
    """Of a text."""
    return lambda text: len(model.tokenize(text, parse_special=False))


def test_a_later_turn_reads_what_is_new(engine, n_tokens):
    _, results = chat(engine, LONG * 20, "Which ships?", "And which birds?")
    assert {one.conversation for one in results} == {results[0].conversation} and [one.n_messages for one in results] == [2, 4, 6]
    assert results[0].usage.cached_tokens == 0 and n_read(results[0]) > n_tokens(LONG * 20)
    assert all(n_read(one) < 20 for one in results[1:])


def test_white_space_around_answers_does_not_matter(engine):
    messages, _ = chat(engine, LONG * 10)
    messages[-1]["content"] = f" {messages[-1]['content'].strip()}\n"
    assert n_read(answer(engine, *messages, user("And then?"))) < 20


def test_answers_are_those_of_a_session_that_goes_on(model, engine):
    """Whatever came between, and wherever the conversation was meanwhile."""
    asked = [LONG * 20, "Which ships?", "Name a bird.", "Why?"]
    with ChatSession(model, CONFIG) as alone:
        alone.set_system(SYSTEM["content"])
        expected = ["".join(alone.send(text)) for text in asked]
    messages = [SYSTEM]
    for text, content in zip(asked, expected, strict=True):
        messages.append(user(text))
        last = answer(engine, *messages)
        assert last.message["content"] == content
        messages.append(said(last))
        chat(engine, "A title, please", history=())
        chat(engine, "Some tags, please", history=())


def test_an_edit_reads_what_comes_after_it_and_leaves_the_old_conversation(engine):
    messages, results = chat(engine, LONG * 10, "Which ships?", LONG * 10, "And which birds?")
    edited, others = chat(engine, "Which storms?", history=messages[:3])
    assert others[0].conversation != results[0].conversation and n_read(others[0]) < 20
    assert n_read(answer(engine, *messages, user("And then?"))) < 20
    assert n_read(answer(engine, *edited, user("And then?"))) < 20
    assert engine.messages(results[0].conversation, "me")[:9] == messages and engine.messages(others[0].conversation, "me")[:5] == edited


@pytest.mark.parametrize("parallel", [1, 2])
def test_an_edit_of_the_second_of_ten_texts(model, n_tokens, parallel):
    """Whether the client cuts off what came after it or sends it again, what came before it is not read again, and the old conversation goes on."""
    texts = [f"Day {i}. {LONG * 2}Which ships came by?" for i in range(10)]
    with Engine(model, CONFIG, parallel=parallel) as engine:
        messages, results = chat(engine, *texts)
        before = results[0].usage.prompt_tokens + results[0].usage.completion_tokens
        assert results[-1].usage.prompt_tokens > 2 * CONFIG.budget
        cut = answer(engine, *messages[:3], user("Which storms?"))
        assert before <= cut.usage.cached_tokens and n_read(cut) <= n_tokens("Which storms?") + 12
        whole = answer(engine, *messages[:3], user("Which boats?"), *messages[4:], user("And then?"))
        assert before <= whole.usage.cached_tokens <= before + 12
        assert n_read(answer(engine, *messages, user("And then?"))) < 20


@pytest.mark.parametrize("parallel", [1, 2])
def test_questions_beside_a_conversation_cost_it_nothing(model, parallel):
    """As web pages ask them after each answer: for a title, with what was said in it, and for tags, with the system prompt of the chat."""
    with Engine(model, CONFIG, parallel=parallel) as engine:
        messages, _ = chat(engine, LONG * 20)
        for text in ("Which ships?", "Which birds?", "Which storms?"):
            said_so_far = "\n".join(message["content"] for message in messages[1:])
            beside = [ask(engine, user(f"Give this chat a title: {said_so_far}")), ask(engine, SYSTEM, user(f"Tag this chat: {said_so_far}"))]
            assert {finished(one).stop_reason for one in beside} == {"length"}
            messages.append(user(text))
            last = answer(engine, *messages)
            assert n_read(last) < 20 and last.n_messages == len(messages)
            messages.append(said(last))


def test_another_answer_to_the_same_is_a_conversation_of_its_own(engine):
    messages, results = chat(engine, LONG * 10, "Which ships?")
    again = answer(engine, *messages[:-1])
    assert again.message == results[-1].message and again.conversation != results[-1].conversation
    assert n_read(again) < 20


def test_an_answer_that_the_client_changed_is_read_as_it_is_now(engine):
    messages, _ = chat(engine, LONG * 10, "Which ships?")
    messages[-1]["content"] = "None at all."
    last = answer(engine, *messages, user("Really?"))
    assert n_read(last) < 40 and engine.messages(last.conversation, "me")[:6] == [*messages, user("Really?")]


def test_owners_never_meet(engine):
    messages, results = chat(engine, LONG * 10)
    last = answer(engine, *messages, user("And then?"), owner="you")
    assert last.usage.cached_tokens == 0
    assert [one.id for one in engine.conversations("you")] == [last.conversation]
    for forbidden in (engine.messages, engine.delete):
        with pytest.raises(UnknownConversation):
            forbidden(results[0].conversation, "you")


def test_what_stands_before_the_first_turn_is_read_once(engine, n_tokens):
    history = [{"role": "system", "content": LONG * 6}]
    _, results = chat(engine, "Hello!", history=history)
    _, others = chat(engine, "Good morning!", history=history)
    assert others[0].conversation != results[0].conversation
    assert results[0].usage.cached_tokens == 0 and others[0].usage.cached_tokens >= n_tokens(LONG * 6)


def test_questions_beside_leave_the_slot_first(model):
    with Engine(model, CONFIG, parallel=2) as engine:
        _, results = chat(engine, "Hello!", "Which ships?")
        for i in range(3):
            chat(engine, f"Title {i}", history=())
        assert results[0].conversation in [one.id for one in engine.conversations() if one.in_slot]


@pytest.mark.parametrize("keep_trimmed", [False, True])
def test_a_history_that_the_client_trimmed(engine, keep_trimmed):
    messages, results = chat(engine, LONG * 10, "Which ships?", "Which birds?")
    request = AnswerRequest("me", [SYSTEM, *messages[3:], user("And then?")], keep_trimmed=keep_trimmed)
    last = finished(engine.submit(request))
    assert (last.conversation == results[0].conversation) == keep_trimmed and (last.n_messages == 8) == keep_trimmed
    assert (last.usage.prompt_tokens > 200) == keep_trimmed


def test_a_request_may_name_its_conversation(engine):
    """Also where another one has more of the history, and NEW where one has all of it."""
    messages, results = chat(engine, LONG * 10)
    fork = finished(engine.submit(AnswerRequest("me", [*messages, user("Which ships?")], conversation=NEW)))
    assert fork.conversation != results[0].conversation and n_read(fork) < 20
    history = [*messages, user("Which ships?"), said(fork), user("And which birds?")]
    for wanted in (results[0].conversation, fork.conversation):
        assert finished(engine.submit(AnswerRequest("me", history, conversation=wanted))).conversation == wanted
    assert finished(engine.submit(AnswerRequest("you", history, conversation=fork.conversation))).conversation != fork.conversation


def test_the_cache_is_shown_while_it_is_answered(engine):
    """By maps of the thread that answers, made only while somebody looks; a conversation that is idle is mapped for who asks."""
    messages, results = chat(engine, *[LONG * 5] * 4)
    identity = results[0].conversation
    before = engine.cache_view(identity, "me")
    assert not before.answering and before.in_slot and before.map.kv.history_tokens > CONFIG.budget
    assert before.map.looked is not None and any(part.recalled for part in before.map.parts)
    answering, seen = ask(engine, *messages, user("Which birds?"), max_tokens=4000), []
    deadline = time.monotonic() + 60
    while len(seen) < 3 and time.monotonic() < deadline:
        view = engine.cache_view(identity, "me")
        if view.answering and view.map is not before.map and view.map not in seen:
            seen.append(view.map)
    assert engine.stop(identity, "me")
    last = finished(answering)
    assert last.stop_reason == "stopped" and len(seen) == 3
    n_tokens = [one.kv.history_tokens for one in seen]
    assert before.map.kv.history_tokens <= n_tokens[0] < n_tokens[2]
    assert all(sum(part.tokens for part in one.parts) == one.kv.history_tokens for one in seen)
    after = engine.cache_view(identity, "me")
    assert not after.answering and not engine.stop(identity, "me")
    assert last.message["content"].strip().startswith(after.map.parts[-1].text.strip())
    for forbidden in (engine.cache_view, engine.stop):
        with pytest.raises(UnknownConversation):
            forbidden(identity, "you")


def test_nobody_looks_and_no_map_is_made(model, monkeypatch):
    made = []
    of = CacheMap.of
    monkeypatch.setattr(CacheMap, "of", lambda cache, **options: made.append(cache) or of(cache, **options))
    with Engine(model, CONFIG) as engine:
        answer(engine, user(LONG * 10), max_tokens=60)
    assert len(made) == 1


def test_maps_take_a_small_part_of_the_time():
    shown, made = ShownMap(), []

    def slow():
        made.append(time.sleep(0.1))

    shown.refresh(slow)
    shown.look()
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        shown.refresh(slow)
    assert len(made) == 1


def test_what_a_finished_answer_looked_at_is_computed_for_who_asks(model):
    """Without an archive no choice has noted it, and with a policy that does not look at attention nothing is known."""
    for policy, known in (("snapkv", True), ("streaming", False)):
        with Engine(model, dataclasses.replace(CONFIG, policy=policy, archive="off"), parallel=1) as engine:
            _, results = chat(engine, LONG * 10, "Which ships?")
            view = engine.cache_view(results[0].conversation, "me")
            assert (view.map.looked is not None) == known
            assert engine.cache_view(results[0].conversation, "me").map is view.map
            # what left its slot is shown as it was
            chat(engine, "Hello!", history=())
            assert not (later := engine.cache_view(results[0].conversation, "me")).in_slot and later.map is view.map


def test_two_requests_for_one_conversation_at_once(engine):
    messages, _ = chat(engine, LONG * 10)
    both = [ask(engine, *messages, user("And then?")) for _ in range(2)]
    one, other = (finished(answering) for answering in both)
    assert one.message == other.message and one.conversation != other.conversation
    assert n_read(one) < 20 and n_read(other) < 20


def test_a_prompt_that_was_given_up_leaves_the_conversation_as_it_was(engine):
    messages, results = chat(engine, LONG * 10)
    answering = ask(engine, *messages, user(LONG * 100))
    time.sleep(0.3)
    answering.cancel()
    assert finished(answering).stop_reason == "stopped"
    assert engine.messages(results[0].conversation, "me") == messages
    assert n_read(answer(engine, *messages, user("And then?"))) < 20


def test_an_answer_that_was_stopped_can_be_gone_on_with(engine):
    events, pieces = ask(engine, SYSTEM, user(LONG * 10), max_tokens=400), []
    for event in (iterator := events.events()):
        pieces.append(event)
        if len(pieces) == 3:
            events.cancel()
    assert isinstance(pieces[-1], Finished) and pieces[-1].stop_reason == "stopped" and iterator
    messages = [SYSTEM, user(LONG * 10), said(pieces[-1]), user("Go on.")]
    assert n_read(answer(engine, *messages)) < 20


def test_an_answer_that_was_stopped_is_waited_for(engine):
    """The next request comes while the answer before it is still ending."""
    messages, results = chat(engine, LONG * 10)
    answering = ask(engine, *messages, user("Tell me a story."), max_tokens=400)
    next(iterator := answering.events())
    answering.cancel()
    last = answer(engine, *messages, user("And then?"))
    assert n_read(last) < 20 and last.usage.cached_tokens > 100
    assert [*iterator][-1].conversation == results[0].conversation


def test_an_answer_that_cannot_begin_leaves_nothing(engine):
    messages, results = chat(engine, LONG * 10)
    for before in ([], messages):
        last = finished(ask(engine, *before, user("Hello!"), grammar="root ::= nothing"))
        assert last.error and last.stop_reason == "error"
    assert [one.id for one in engine.conversations()] == [results[0].conversation]
    assert n_read(answer(engine, *messages, user("And then?"))) < 20


def test_a_conversation_can_be_deleted(engine):
    messages, results = chat(engine, LONG * 10)
    engine.delete(results[0].conversation, "me")
    assert engine.conversations() == []
    assert answer(engine, *messages, user("And then?")).usage.cached_tokens == 0


def test_without_an_archive_what_was_compressed_is_read_again(model):
    config = dataclasses.replace(CONFIG, archive="off", policy="snapkv")
    with Engine(model, config, parallel=1) as engine:
        messages, _ = chat(engine, LONG * 20, "Which ships?")
        chat(engine, "A title, please", history=())
        last = answer(engine, *messages, user("And then?"))
        assert n_read(last) < 20
        last = answer(engine, *messages[:3], user("Which storms?"))
        assert last.usage.prompt_tokens > 300 and engine.messages(last.conversation, "me")[3] == user("Which storms?")


def test_a_model_with_a_sliding_window(short_gemma3):
    """Its cells come back as they were, and what is before its last turn is read again."""
    with Model(short_gemma3) as model, Engine(model, CONFIG, parallel=1) as engine:
        messages, _ = chat(engine, LONG * 20, "Which ships?", history=())
        chat(engine, "A title, please", history=())
        expected = answer(engine, *messages, user("And then?"))
        assert n_read(expected) < 20
        last = answer(engine, *messages[:2], user("Which storms?"))
        assert engine.messages(last.conversation, "me")[2] == user("Which storms?")


def test_idle_conversations_are_bounded_in_memory(model):
    with Engine(model, CONFIG, parallel=1, idle_ram=1) as engine:
        messages, _ = chat(engine, LONG * 10)
        chat(engine, "Hello!", history=())
        chat(engine, "Good morning!", history=())
        wait_for(lambda: len(engine.conversations()) == 1)
        assert answer(engine, *messages, user("And then?")).usage.cached_tokens == 0


def test_what_leaves_its_slot_is_freed_at_once(model):
    """Most of its memory is not Python's, so Python would look for what keeps itself far too seldom."""
    kept = (ChatSession, TextSession, BudgetedCache, Slot)

    def there():
        return sum(isinstance(one, kept) for one in gc.get_objects())

    with Engine(model, CONFIG, parallel=1) as engine:
        gc.collect()
        gc.disable()
        try:
            before = there()
            ended = [answer(engine, user(text)) for text in (LONG * 10, "Hello!", "Good morning!")]
            answering = ask(engine, user(LONG * 50))
            answering.cancel()
            finished(answering)
            text = engine.submit(TextRequest("me", "The keeper of", options=AnswerOptions(max_tokens=2)))
            assert finished(text).error is None and there() > before
            for last in ended:
                engine.delete(last.conversation, "me")
            engine.forget("me")
            assert there() == before
        finally:
            gc.enable()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# on the disk


def test_another_engine_goes_on(model, tmp_path):
    with Engine(model, CONFIG, parallel=1, directory=tmp_path) as engine:
        messages, results = chat(engine, LONG * 20, "Which ships?")
        expected = answer(engine, *messages, user("And then?")).message
        fork = answer(engine, *messages[:3], user("Which storms?"))
    with Engine(model, CONFIG, parallel=1, directory=tmp_path) as engine:
        assert {one.id for one in engine.conversations("me")} == {results[0].conversation, fork.conversation}
        assert engine.messages(results[0].conversation, "me")[:5] == messages
        again = answer(engine, *messages[:3], user("Which storms?"), said(fork), user("And then?"))
        assert again.conversation == fork.conversation and n_read(again) < 20
        last = answer(engine, *messages, user("And then?"))
        assert n_read(last) < 20 and last.message == expected


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "enum": ["north", "south"]}}, "required": ["place"]},
    },
}


@pytest.fixture(scope="module")
def with_tools(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "tools.gguf"
    template = (Path(__file__).parent / "chatml_tools.jinja").read_text()
    copy(Source(smollm2), path, metadata={"tokenizer.chat_template": template})
    with Model(path) as model:
        yield model


def test_calls_of_tools_are_part_of_a_conversation(with_tools, tmp_path):
    """A call, what it gave back, and the answer to that, in another process too."""
    asked = [SYSTEM, user("How is the weather?")]
    with Engine(with_tools, CONFIG, parallel=1, directory=tmp_path) as engine:
        *pieces, last = ask(engine, *asked, tools=[WEATHER], tool_choice="required", max_tokens=80).events()
        assert last.error is None and last.stop_reason == "tool_calls"
        calls = last.message["tool_calls"]
        assert {call["function"]["name"] for call in calls} == {"weather"} and any(piece.tool_calls for piece in pieces)
        sent_back = {"role": "assistant", "content": last.message["content"], "tool_calls": calls}
        messages = [*asked, sent_back, *({"role": "tool", "content": "Fog.", "tool_call_id": call["id"]} for call in calls)]
        after = answer(engine, *canonical(messages), tools=[WEATHER], tool_choice="none")
        assert after.conversation == last.conversation and n_read(after) < 20 + 20 * len(calls)
        messages = [*canonical(messages), said(after), user("Thank you.")]
        assert answer(engine, *messages, tool_choice="none").usage.cached_tokens == 0  # without the tools it is another conversation
    with Engine(with_tools, CONFIG, parallel=1, directory=tmp_path) as engine:
        assert engine.messages(last.conversation, "me")[2]["tool_calls"] == calls
        again = answer(engine, *messages, tools=[WEATHER], tool_choice="none")
        assert again.conversation == last.conversation and n_read(again) < 40


def test_one_engine_at_a_time_has_a_directory(model, tmp_path):
    with Engine(model, CONFIG, directory=tmp_path), pytest.raises(KvlocalError, match="stop it, or give another directory"):
        Engine(model, CONFIG, directory=tmp_path)


def test_what_the_disk_has_can_leave_memory(model, tmp_path):
    with Engine(model, CONFIG, parallel=1, directory=tmp_path, idle_ram=1) as engine:
        messages, _ = chat(engine, LONG * 20)
        chat(engine, "Hello!", history=())
        chat(engine, "Good morning!", history=())
        wait_for(lambda: sum(one.bytes_in_memory > 0 for one in engine.conversations()) == 1)
        assert n_read(answer(engine, *messages, user("And then?"))) < 20


def test_others_get_tokens_while_a_conversation_is_read_from_the_disk(model, tmp_path, monkeypatch):
    with Engine(model, CONFIG, parallel=2, directory=tmp_path) as engine:
        messages, _ = chat(engine, LONG * 20)
    read, progress, arrived = ArchiveFile.read, threading.Event(), []

    def slow_read(file, extents):
        """A disk that takes until another answer has come further."""
        progress.clear()
        arrived.append(progress.wait(60))
        return read(file, extents)

    monkeypatch.setattr(ArchiveFile, "read", slow_read)
    with Engine(model, CONFIG, parallel=2, directory=tmp_path) as engine:
        other = ask(engine, user("Tell me a story."), max_tokens=4000)
        started = threading.Event()
        other.on_event(lambda event: (started.set(), progress.set()))
        assert started.wait(60)
        assert n_read(answer(engine, *messages, user("And then?"))) < 20
        other.cancel()
    assert arrived == [True]


@pytest.mark.parametrize("archive", ["ram", "disk", "off"])
def test_what_a_killed_process_delivered_is_in_its_conversation(short_smollm2, model, tmp_path, archive):
    """A process answers, says what it has passed on, and is killed in the middle of the next answer."""
    script = f"""
import sys, time
from test_serving import *
config = dataclasses.replace(CONFIG, archive={archive!r}, archive_ram=0 if {archive!r} == "disk" else 2**30)
with Model({str(short_smollm2)!r}) as model, Engine(model, config, directory=Path({str(tmp_path)!r})) as engine:
    messages, results = chat(engine, LONG * 20, "Which ships?")
    wait_for(lambda: any(Path({str(tmp_path)!r}).glob("*/*.snapshot")))
    time.sleep(0.5)
    print(results[-1].conversation, flush=True)
    for piece in ask(engine, *messages, user("And which birds?"), max_tokens=4000).events():
        print(repr(piece.text), flush=True)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as process:
        conversation, *texts = (process.stdout.readline() for _ in range(8))
        process.kill()
        texts += process.stdout.readlines()
    received = "".join(ast.literal_eval(text) for text in texts if text.endswith("\n"))
    with Engine(model, dataclasses.replace(CONFIG, archive=archive), directory=tmp_path) as engine:
        messages = engine.messages(conversation.strip(), "me")
        assert len(messages) == 7 and received and messages[-1]["content"].startswith(received)
        last = answer(engine, *messages, user("Go on."))
        assert last.conversation == conversation.strip() and n_read(last) < 60 + 2 * len(messages[-1]["content"])


def test_conversations_are_bounded_on_the_disk(model, tmp_path):
    with Engine(model, CONFIG, parallel=1, directory=tmp_path, disk=1) as engine:
        chat(engine, "Hello!", history=())
        _, results = chat(engine, "Good morning!", history=())
        wait_for(lambda: [one.id for one in engine.conversations()] == [results[0].conversation])
        wait_for(lambda: [path.stem for path in tmp_path.glob("*/*.jsonl")] == [results[0].conversation])


def test_what_cannot_be_written_is_not_answered(model, tmp_path):
    """A file is where the directory of the owner should be."""
    with Engine(model, CONFIG, directory=tmp_path) as engine:
        (tmp_path / owner_digest("me")).touch()
        last = finished(ask(engine, user("Hello!")))
        assert "cannot write" in str(last.error) and engine.conversations() == []
        (tmp_path / owner_digest("me")).unlink()
        messages, results = chat(engine, "Hello!")
        assert engine.messages(results[0].conversation, "me") == messages


def test_a_deleted_conversation_leaves_nothing_on_the_disk(model, tmp_path):
    with Engine(model, CONFIG, directory=tmp_path) as engine:
        _, results = chat(engine, LONG * 10)
        engine.delete(results[0].conversation, "me")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_a_conversation_may_be_deleted_by_two_threads_at_once(tmp_path, monkeypatch):
    """Whoever asks for it, and the thread that was just writing its snapshot."""
    errors = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (time.sleep(0.01), unlink(path, **options)))

    def delete(record, both_are_here):
        both_are_here.wait()
        try:
            record.delete()
        except KvlocalError as error:
            errors.append(error)

    for i in range(5):
        record = Record(tmp_path / f"{i}.jsonl")
        record.begin("model.gguf", None, ())
        record.add_turns([user("Hello")])
        record.close()
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=delete, args=(record, barrier)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert not list(tmp_path.iterdir())


def test_a_conversation_that_has_no_snapshot_begins_from_that_of_another(model, tmp_path):
    """A server that is killed soon after a conversation was forked has written its words, and no snapshot of it."""
    with Engine(model, CONFIG, parallel=1, directory=tmp_path) as engine:
        messages, _ = chat(engine, LONG * 20, "Which ships?")
        fork = answer(engine, *messages[:3], user("Which storms?"))
    (snapshot,) = tmp_path.glob(f"*/{fork.conversation}.jsonl.snapshot")
    snapshot.unlink()
    with Engine(model, CONFIG, parallel=1, directory=tmp_path) as engine:
        other = answer(engine, *messages[:3], user("Which storms?"))
        assert n_read(other) < 20 and other.conversation != fork.conversation
    snapshot.with_name(f"{other.conversation}.jsonl.snapshot").unlink()
    with Engine(model, CONFIG, parallel=1, directory=tmp_path) as engine:
        last = answer(engine, *messages[:3], user("Which storms?"), said(fork), user("And then?"))
        assert n_read(last) < 50 and last.conversation in (fork.conversation, other.conversation)
