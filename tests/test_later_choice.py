"""Choices of cells that are found beside decoding: what they choose, when it takes effect, and what they must not be used for."""

import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from recalling import CONFIG, session, tokens
from test_recall import check, user
from test_slots import together

from kvlocal.cache.budgeted import BudgetedCache, Passage
from kvlocal.cache.later_choice import LaterChoice
from kvlocal.cache.recall import ChosenTokens
from kvlocal.llama.context import Context
from kvlocal.llama.errors import NativeError
from kvlocal.policies.recall import Recall

LATE = 4

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def model(shallow_model):
    return shallow_model


def opened(model, late=LATE, **changes):
    """A cache whose choices are late, as where the cells are on a device."""
    cache = BudgetedCache(model, replace(CONFIG, **changes))
    cache.compressor.late = late
    return cache


def answer(cache, n, seed=5):
    for token in tokens(n, seed):
        cache.append(np.array([token]), "decode")


def held(cache):
    return cache.ledger.tokens[..., : cache.ledger.n_cells].copy()


def test_a_choice_takes_effect_so_many_tokens_later(model):
    """It is the one that would have been made at once, with what has come since."""
    with opened(model) as cache:
        compressor, ledger = cache.compressor, cache.ledger
        cache.read([*user(20), *user(300, 1)])
        assert compressor.tokens_before_choice(ledger) is None
        before, choices = held(cache), compressor.choices
        # the fourth of the answer
        answer(cache, 1)
        assert compressor.tokens_before_choice(ledger) == LATE and compressor.choices == choices
        np.testing.assert_array_equal(held(cache)[..., : before.shape[-1]], before)
        n, free = ledger.n_tokens, Recall().refresh + 1 + LATE
        expected = compressor.recaller.choice(ledger, cache.target + CONFIG.stride - free, Recall().for_question)().tokens
        assert (expected != before[..., -expected.shape[-1] :]).any()
        answer(cache, LATE, 6)
        assert compressor.tokens_before_choice(ledger) is None and compressor.choices == choices + 1
        new = np.broadcast_to(np.arange(n, n + LATE), (*expected.shape[:2], LATE))
        np.testing.assert_array_equal(held(cache), np.concatenate([expected, new], axis=-1))
        compressor.write_through(ledger)
        check(cache, cache.archive)


def test_a_long_answer_is_chosen_for_as_often_and_no_more_cells_are_used(model):
    found = {}
    for late in (0, LATE):
        with opened(model, late) as cache:
            cache.read([*user(20), *user(300, 1)])
            answer(cache, 100)
            found[late] = cache.compressor.choices
            assert cache.peak <= CONFIG.budget + CONFIG.stride
            cache.compressor.write_through(cache.ledger)
            check(cache, cache.archive)
    assert abs(found[0] - found[LATE]) <= 1


def test_the_same_text_has_the_same_answer_whatever_the_search_takes(model, monkeypatch):
    texts = ["Tell me of the lighthouse.", "And of its keeper, please. " * 20, "Go on."]
    begin, said = LaterChoice.begin, []

    def slowly(self, n_tokens, find):
        begin(self, n_tokens, lambda: (threading.Event().wait(0.05), find())[1])

    for slow in (False, True):
        if slow:
            monkeypatch.setattr(LaterChoice, "begin", slowly)
        with session(model, max_tokens=40) as chat:
            chat.cache.compressor.late = LATE
            said.append(["".join(chat.send(text)) for text in texts])
            assert chat.cache.compressor.choices > 5
    assert said[0] == said[1]


def test_a_given_answer_is_read_as_one_that_is_generated(model):
    found = []
    for at_once in (False, True):
        with opened(model) as cache:
            cache.read([*user(20), *user(300, 1)])
            if at_once:
                cache.read([Passage("assistant", tokens(60, 8))])
            else:
                for token in tokens(60, 8):
                    cache.append(np.array([token]), "decode")
            found.append(held(cache))
    # on the way a product of more tokens may be rounded otherwise
    assert found[0].shape == found[1].shape and (found[0] == found[1]).mean() > 0.95


@pytest.mark.cpu_only  # where a row of a product is rounded the same whatever rows stand beside it
def test_conversations_beside_each_other_choose_as_each_alone(model):
    def converse(seed, make_context):
        with BudgetedCache(model, CONFIG, make_context=make_context) as cache:
            cache.compressor.late = LATE
            cache.read([*user(20, seed), *user(300, seed + 1)])
            answer(cache, 60, seed)
            assert cache.compressor.choices > 5
            return held(cache)

    options = {"n_cells": CONFIG.budget + CONFIG.stride, "n_ubatch": CONFIG.n_ubatch, "n_recorded": 16}
    tasks = [partial(lambda seed, slot: converse(seed, lambda *_, **__: slot), seed) for seed in range(3)]
    for seed, found in enumerate(together(model, *tasks, **options)):
        np.testing.assert_array_equal(found, converse(seed, Context))


def test_what_goes_back_or_ends_meanwhile_drops_the_choice(model):
    for how in ("undo", "mark", "compress", "hold", "begin", "snapshot"):
        with opened(model) as cache:
            cache.read(user(20))
            cache.mark()
            cache.read(user(300, 1))
            answer(cache, 2)
            assert cache.compressor.tokens_before_choice(cache.ledger) is not None, how
            if how == "undo":
                assert cache.set_length(23)
            elif how == "mark":
                cache.mark()
            elif how == "compress":
                cache.compressor.stride = 8
                cache.compress()
            elif how == "hold":
                with cache.hold():
                    pass
            elif how == "begin":
                cache.begin(0)
            else:
                cache.snapshot()
            assert cache.compressor.tokens_before_choice(cache.ledger) is None, how
            if how != "begin":
                answer(cache, 30)
                cache.compressor.write_through(cache.ledger)
                check(cache, cache.archive)


@pytest.mark.parametrize("unsupported", [False, True])
def test_a_search_that_fails_ends_as_one_at_once_does(model, monkeypatch, unsupported):
    """What cannot be done at all gives the archive up; anything else is an error, and the cells are as they were."""
    with opened(model) as cache:
        cache.read([*user(20), *user(300, 1)])
        answer(cache, 2)
        lib = cache.native._lib

        def broken():
            raise NativeError("it is broken", lib.KVL_ERR_UNSUPPORTED if unsupported else lib.KVL_ERR_COMPUTE)

        cache.compressor._later.begin(cache.ledger.n_tokens, broken)
        if unsupported:
            answer(cache, 30)
            assert cache.archive is None and cache.compressor.lost == "it is broken"
        else:
            with pytest.raises(NativeError, match="it is broken"):
                answer(cache, LATE)
            assert not cache.uncertain
            check(cache, cache.archive) if cache.compressor.write_through(cache.ledger) else None


def test_a_choice_that_has_no_room_any_more_never_takes_effect(model):
    with opened(model) as cache:
        cache.read([*user(20), *user(300, 1)])
        answer(cache, 2)
        ledger, choices = cache.ledger, cache.compressor.choices
        many = np.broadcast_to(np.arange(ledger.n_tokens, dtype=np.int32), (*ledger.tokens.shape[:2], ledger.n_tokens))
        cache.compressor._later.begin(ledger.n_tokens, lambda: ChosenTokens(ledger.n_tokens, many))
        answer(cache, LATE)
        assert cache.compressor.choices == choices and cache.compressor.tokens_before_choice(ledger) is None
        cache.compressor.write_through(ledger)
        check(cache, cache.archive)


def test_a_failure_is_told_once(model):
    later = LaterChoice()
    later.begin(5, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        later.take()
    assert later.age(9) is None
    later.close()


def test_closing_ends_the_thread(model):
    with opened(model) as cache:
        cache.read([*user(20), *user(300, 1)])
        answer(cache, 2)
        assert any(thread.name.startswith("kvlocal-choice") for thread in threading.enumerate())
    assert not any(thread.name.startswith("kvlocal-choice") for thread in threading.enumerate())


def test_what_has_come_since_joins_a_choice():
    tokens, scores = np.array([[[0, 2]]], np.int32), np.array([[[0.5, 0.25]]], np.float32)
    later = ChosenTokens(3, tokens, scores, np.array([0.5, 0.0, 0.25])).with_new(5)
    assert later.n_tokens == 5 and later.tokens.tolist() == [[[0, 2, 3, 4]]] and later.scores.tolist() == [[[0.5, 0.25, 0, 0]]]
    assert later.attention.tolist() == [0.5, 0, 0.25, 0, 0]
    assert ChosenTokens(3, tokens).with_new(4).scores is None
