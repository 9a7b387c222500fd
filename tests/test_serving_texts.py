"""An engine goes on with texts beside its conversations, in the same queue and slots, and embeds texts."""

import threading
import time

import numpy as np
import pytest
from test_serving import CONFIG, LONG, answer, ask, chat, finished, model, n_read, user, wait_for  # noqa: F401

from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.text_session import TextSession
from kvlocal.llama.embedding import Embedder, EmbeddingError
from kvlocal.serving.engine import Engine
from kvlocal.serving.live import Cancelled
from kvlocal.serving.request import EngineBusy, EngineClosed, TextRequest

SHORT = "The capital of France is"


@pytest.fixture
def engine(model):  # noqa: F811
    with Engine(model, CONFIG, parallel=2, waiting=2) as engine:
        yield engine


def go_on(engine, prompt, owner="me", echo=False, draws=True, **options):
    return engine.submit(TextRequest(owner, prompt, options=AnswerOptions(**options), echo=echo, draws=draws))


def goes_on(engine, prompt, **options):
    *_, last = go_on(engine, prompt, **options).events()
    assert last.error is None, last.error
    return last


def test_it_is_that_of_a_session_alone(model, engine):  # noqa: F811
    with TextSession(model, CONFIG) as alone:
        for prompt in (SHORT, LONG * 16):
            alone.read(prompt)
            expected = "".join(alone.answer())
            last = finished(go_on(engine, prompt))
            assert last.message["content"] == expected and last.stop_reason == "length"
            assert last.usage.prompt_tokens == len(alone.tokenize(prompt)) and last.usage.completion_tokens == 8


def test_what_it_begins_with_is_not_read_again(engine):
    text = (LONG * 16).strip()
    grown = text + goes_on(engine, text).message["content"] + " And so on."
    last = goes_on(engine, grown)
    assert n_read(last) < 20 and last.usage.cached_tokens > 300
    assert goes_on(engine, grown, owner="you").usage.cached_tokens == 0


def test_conversations_and_texts_give_each_other_their_slots(engine):
    messages, _ = chat(engine, LONG * 14, "Which ships?")
    expected = [goes_on(engine, f"{i}. {LONG * 10}").message["content"] for i in range(3)]
    last = answer(engine, *messages, user("And then?"))
    assert n_read(last) < 20
    assert [goes_on(engine, f"{i}. {LONG * 10}").message["content"] for i in range(3)] == expected
    assert len(engine.conversations()) == 1


def test_the_text_comes_first_if_it_is_wanted(engine):
    *pieces, last = go_on(engine, SHORT, echo=True, top_logprobs=1).events()
    assert pieces[0].text == SHORT and len(pieces[0].logprobs) == last.usage.prompt_tokens
    assert last.message["content"] == "".join(piece.text for piece in pieces[1:])
    (only, end) = go_on(engine, SHORT, echo=True, draws=False, top_logprobs=1).events()
    assert (only.text, end.message["content"], end.usage.completion_tokens) == (SHORT, "", 0)
    assert [one.logprob for one in only.logprobs[1:]] == [one.logprob for one in pieces[0].logprobs[1:]]


def test_a_text_that_is_cancelled_stops_soon_and_leaves_its_slot(engine):
    for tokens in (4000, 1):
        answering = go_on(engine, LONG * (1 if tokens > 1 else 100), max_tokens=tokens)
        time.sleep(0.3)
        started = time.perf_counter()
        answering.cancel()
        *_, last = answering.events()
        assert last.stop_reason == "stopped" and last.error is None and time.perf_counter() - started < 2
    assert [goes_on(engine, SHORT, owner=f"{i}").stop_reason for i in range(3)] == ["length"] * 3


def test_what_cannot_be_gone_on_with_concerns_no_other(engine):
    beside = ask(engine, user("Hello"))
    for prompt, options, words in (([], {}, "at least one token"), ([10**9], {}, "is no token"), (SHORT, {"grammar": "root ::= no"}, "grammar")):
        *_, last = go_on(engine, prompt, **options).events()
        assert words in str(last.error) and last.stop_reason == "error"
    assert finished(beside).stop_reason == "length" and goes_on(engine, SHORT).stop_reason == "length"


def test_texts_wait_in_the_same_queue(engine):
    running = [go_on(engine, SHORT, max_tokens=4000) for _ in range(4)]
    with pytest.raises(EngineBusy):
        go_on(engine, SHORT)
    for one in running:
        one.cancel()
    assert {[*one.events()][-1].stop_reason for one in running} == {"stopped"}


def test_a_long_text_does_not_hold_up_an_answer(engine):
    *_, before = ask(engine, user("Hello"), max_tokens=40).events()
    reading = go_on(engine, LONG * 150)
    time.sleep(0.3)
    *_, last = ask(engine, user("Hello"), max_tokens=40).events()
    reading.cancel()
    assert last.message == before.message and [*reading.events()][-1].stop_reason == "stopped"


# embeddings


def test_texts_are_embedded_beside_an_answer(model, engine):  # noqa: F811
    with Embedder(model, n_threads=1) as embedder:
        expected = [embedder.embed(text) for text in (SHORT, LONG * 16)]
    running = ask(engine, user("Tell me a story."), max_tokens=4000)
    found = engine.embed([SHORT, LONG * 16], threading.Event()).result(120)
    assert all(np.array_equal(one.vector, vector) for one, vector in zip(found, expected, strict=True)) and found[1].n_tokens > 300
    running.cancel()
    *pieces, last = running.events()
    assert last.stop_reason == "stopped" and pieces


def test_what_has_no_embedding_is_told(engine):
    with pytest.raises(EmbeddingError, match="is no token"):
        engine.embed([SHORT, [10**9]], threading.Event()).result(60)
    assert len(engine.embed([SHORT], threading.Event()).result(60)) == 1


def test_embeddings_that_nobody_wants_any_more_end(engine):
    gone = threading.Event()
    jobs = [engine.embed([LONG * 20] * 100, gone) for _ in range(5)]
    with pytest.raises(EngineBusy):
        engine.embed([SHORT], threading.Event())
    time.sleep(0.2)
    gone.set()
    for job in jobs:
        with pytest.raises(Cancelled):
            job.result(10)
    assert len(engine.embed([SHORT], threading.Event()).result(60)) == 1


def test_many_long_texts_do_not_hold_up_a_short_one(engine):
    gone = threading.Event()
    long = engine.embed([LONG * 5] * 1000, gone)
    assert len(engine.embed([SHORT, SHORT], threading.Event()).result(60)) == 2
    assert engine.stats().embedding == 1 and not long.done()
    gone.set()
    wait_for(lambda: engine.stats().embedding == 0)


def test_closing_gives_embeddings_time(model):  # noqa: F811
    engine = Engine(model, CONFIG)
    job = engine.embed([LONG * 5] * 2, threading.Event())
    engine.close(60)
    assert len(job.result(0)) == 2


def test_closing_ends_embeddings(model):  # noqa: F811
    engine = Engine(model, CONFIG)
    jobs = [engine.embed([LONG * 20] * 100, threading.Event()) for _ in range(2)]
    time.sleep(0.3)
    engine.close()
    for job in jobs:
        with pytest.raises(EngineClosed):
            job.result(10)
    with pytest.raises(EngineClosed):
        engine.embed([SHORT], threading.Event())
