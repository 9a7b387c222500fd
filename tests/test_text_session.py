"""A text is gone on with as it is, in a fixed budget, and nothing of it is read twice that need not be."""

import dataclasses
import math

import numpy as np
import pytest

from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.text_session import TextSession
from kvlocal.llama.context import Context
from kvlocal.llama.grammar import GrammarError
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams, log_probabilities

GREEDY = SamplingParams(temperature=0)
CONFIG = SessionConfig(budget=128, stride=32, n_ubatch=32, n_threads=1, sampling=GREEDY, max_tokens=8, archive="ram", policy="recall")
WITHOUT_ARCHIVE = dataclasses.replace(CONFIG, archive="off", policy="snapkv")
LONG = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. " * 20
SHORT = "The capital of France is"


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as loaded:
        yield loaded


@pytest.fixture
def session(model):
    with TextSession(model, CONFIG) as session:
        yield session


def complete(session, prompt, **options):
    session.read(prompt)
    return "".join(session.answer(AnswerOptions(**options)))


def greedy(model, tokens, n):
    """What llama.cpp alone goes on with, the slow way: the whole text evaluated for each token."""
    tokens = list(tokens)
    with Context(model, n_cells=256, n_ubatch=256, n_threads=1) as context:
        for _ in range(n):
            context.clear()
            context.decode(tokens, 0)
            tokens.append(int(context.logits().argmax()))
    return tokens[-n:]


def test_a_text_goes_on_as_the_model_alone_goes_on(model, session):
    expected = greedy(model, model.tokenize(SHORT, parse_special=True), 8)
    assert complete(session, SHORT) == model.detokenize(expected)
    assert list(session.last.drawn) == expected and session.last.stop_reason == "length"
    assert session.tokens.tolist() == [*model.tokenize(SHORT, parse_special=True), *expected]


def test_tokens_are_taken_as_they_are(model, session):
    tokens = model.tokenize(SHORT, parse_special=True)
    expected = complete(session, SHORT)
    assert complete(session, tokens.tolist()) == expected and complete(session, tokens) == expected


@pytest.mark.parametrize("policy", ["recall", "snapkv", "kvzip", "nexus", "dynsplit", "streaming"])
def test_a_text_beyond_the_budget_is_compressed(model, policy):
    config = dataclasses.replace(CONFIG, policy=policy, archive=None)
    with TextSession(model, config) as session:
        assert complete(session, LONG)
        assert session.kv.history_tokens > 300 and session.kv.used <= 160 and session.kv.compressions


@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize("config", [CONFIG, WITHOUT_ARCHIVE], ids=["archive", "without"])
def test_the_same_text_goes_on_in_the_same_way(model, config, n_parts):
    """Also where the text, or what it begins with, is in the cells already."""
    prompts = [LONG, LONG + SHORT][:n_parts]
    with TextSession(model, config) as session:
        expected = [complete(session, prompt) for prompt in prompts][-1]
        n_known = session.read(prompts[-1])
        assert "".join(session.answer()) == expected
        assert n_known > 0 or config is WITHOUT_ARCHIVE


def test_a_text_that_grows_is_read_once(model, session):
    text = LONG
    text += complete(session, text)
    n = len(session.tokens)
    assert session.read([*session.tokens.tolist(), *model.tokenize(SHORT, parse_special=True)]) == n
    # a text in whose tokens the seam is another is read again from there
    complete(session, text)
    assert session.read(text + " " + SHORT) > n - 10


def test_another_text_is_read_from_its_beginning(model, session):
    complete(session, LONG)
    with TextSession(model, CONFIG) as other:
        expected = complete(other, SHORT)
    assert session.read(SHORT) < 6 and "".join(session.answer()) == expected


def test_it_ends_at_a_stop_text_which_is_no_part_of_it(session):
    whole = complete(session, SHORT, max_tokens=16)
    stop = whole[len(whole) // 2 :][:3]
    text = complete(session, SHORT, max_tokens=16, stop=[stop])
    assert text == whole[: whole.index(stop)] and session.last.stop_reason == "stop"
    # what is in the cache is what it says
    assert session.model.detokenize(session.tokens) == SHORT + text


def test_it_follows_a_grammar_or_a_schema(session):
    assert complete(session, SHORT, grammar='root ::= "yes" | "no"') in ("yes", "no")
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 5}}, "required": ["age"]}
    session.read("How old is it? ")
    text = "".join(session.answer(AnswerOptions(json_schema=schema, max_tokens=64)))
    assert text.startswith("{") and '"age"' in text
    session.read(SHORT)
    with pytest.raises(GrammarError):
        session.answer(AnswerOptions(grammar="root ::= nothing"))
    assert "".join(session.answer())


def test_log_probabilities_of_the_text_and_of_what_comes(model, session):
    session.read(SHORT, top_logprobs=2)
    pieces = list(session.pieces(AnswerOptions(max_tokens=3, top_logprobs=2)))
    told = [*session.prompt_logprobs, *(each for piece in pieces for each in piece.logprobs)]
    tokens = session.tokens
    assert [each.token for each in told] == [model.token_bytes(int(token), special=True) for token in tokens]
    assert math.isnan(told[0].logprob) and not told[0].top
    with Context(model, n_cells=256, n_ubatch=256, n_threads=1) as context:
        context.decode(tokens, 0, logits="all")
        rows = context.logits_all()
    for i, each in enumerate(told[1:]):
        expected, top = log_probabilities(rows[i], int(tokens[i + 1]), 2)
        assert each.logprob == pytest.approx(expected, abs=0.05) and [one for one, _ in each.top] == [model.token_bytes(one) for one, _ in top]


def test_seeds(model):
    hot = dataclasses.replace(CONFIG, sampling=SamplingParams(temperature=1.5, seed=3))
    with TextSession(model, hot) as session:
        first = complete(session, SHORT)
        assert complete(session, SHORT) == first
        session.set_sampling(SamplingParams(temperature=1.5, seed=4))
        assert complete(session, SHORT) != first
        session.set_sampling(SamplingParams(temperature=1.5))
        assert complete(session, SHORT) != complete(session, SHORT)


def test_the_repeat_penalty_looks_at_the_text(model):
    """As llama.cpp's programs have it."""
    strong = dataclasses.replace(CONFIG, sampling=SamplingParams(temperature=0, repeat_penalty=1000.0))
    with TextSession(model, strong) as session:
        complete(session, "a a a a a a a", max_tokens=4)
        given = {int(token) for token in model.tokenize("a a", parse_special=True)}
        assert not given & {*session.last.drawn}


def test_without_text_it_begins_one(model, session):
    assert session.tokenize("").tolist() == [model.bos if model.bos is not None else model.eos]
    assert complete(session, "")


@pytest.mark.parametrize("prompt, words", [([], "at least one token"), ([1, 10**9], "is no token"), ([-1], "is no token"), ([2**70], "is no token")])
def test_what_is_no_text(session, prompt, words):
    with pytest.raises(SessionError, match=words):
        session.read(prompt)
    with pytest.raises(SessionError, match="no text to go on with"):
        session.answer()
    assert complete(session, SHORT)


def test_what_belongs_to_chats_is_refused(session):
    session.read(SHORT)
    with pytest.raises(SessionError, match="tools are called in chats alone"):
        session.answer(AnswerOptions(tools=[{"type": "function", "function": {"name": "weather"}}]))
    assert "".join(session.answer())


def test_it_is_gone_on_with_once(session):
    complete(session, SHORT)
    with pytest.raises(SessionError, match="read one first"):
        session.answer()


def test_a_loop_that_ends_early_ends_it(session):
    session.read(SHORT)
    pieces = session.pieces(AnswerOptions(max_tokens=100))
    first = next(pieces)
    pieces.close()
    assert session.last.stop_reason == "stopped" and session.model.detokenize(session.tokens) == SHORT + first.text
    session.read(SHORT)
    session.stop()
    assert not "".join(session.answer()) and session.last.stop_reason == "stopped"
    assert complete(session, SHORT)


@pytest.mark.parametrize("prompt, top", [("Once upon a time", None), (SHORT, None), (SHORT, 1)])
def test_cells_that_are_not_certain_are_not_used(session, prompt, top):
    expected = complete(session, prompt)
    complete(session, SHORT)
    session.cache.doubt()
    assert session.read(prompt, top_logprobs=top) == 0 and "".join(session.answer()) == expected


def test_a_read_that_is_broken_off_leaves_nothing_wrong(model):
    class Enough(Exception):
        pass

    def progress(done, total):
        if done > 100 and not told:
            told.append((done, total))
            raise Enough

    told = []
    with TextSession(model, CONFIG, progress=progress) as session:
        with pytest.raises(Enough):
            session.read(LONG)
        again = complete(session, LONG)
    with TextSession(model, CONFIG) as session:
        assert complete(session, LONG) == again
    assert told[0][1] == len(model.tokenize(LONG, parse_special=True))


def test_a_model_with_a_sliding_window(short_gemma3):
    with Model(short_gemma3) as model, TextSession(model, CONFIG) as session:
        first = complete(session, LONG)
        assert complete(session, LONG) == first
        assert np.count_nonzero(session.tokens == model.bos) == 1
