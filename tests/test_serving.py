"""An engine answers requests side by side, each in its conversation, and reads only what is new."""

import threading
import time

import pytest

from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.session import ChatSession
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import AnswerRequest, EngineBusy, Finished

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
    assert last.error is None
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
