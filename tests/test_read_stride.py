"""The stride while a text is read: how far the cache grows then, and that answers know nothing of it."""

from dataclasses import replace

import numpy as np
import pytest
from recalling import CHAT, CONFIG, ask, read_nothing_again, tokens

from kvlocal.cache.budgeted import BudgetedCache, Passage
from kvlocal.cache.config import CacheConfig, CacheError
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.snapshot import Snapshots
from kvlocal.evaluation.variants import Variant

pytestmark = pytest.mark.device

ANSWER = CONFIG.budget + CONFIG.stride
TEXT = CONFIG.budget + 96
WIDE = replace(CONFIG, read_stride=96)


def with_policy(policy: str) -> CacheConfig:
    return WIDE if policy == "recall" else replace(WIDE, policy=policy, archive=None)


def sizes(cache: BudgetedCache) -> list[int]:
    """Gets the cells in use after each change of them from now on."""
    found: list[int] = []
    after = cache.compressor.after_append

    def note(ledger, reading):
        found.append(ledger.n_cells)
        after(ledger, reading)

    cache.compressor.after_append = note
    return found


@pytest.mark.parametrize("policy", ["recall", "snapkv", "gkv"])
def test_a_text_is_compressed_less_often(shallow_model, policy):
    compressions = []
    for config in (replace(with_policy(policy), read_stride=None), with_policy(policy)):
        with BudgetedCache(shallow_model, config) as cache:
            found = sizes(cache)
            cache.read([Passage("user", tokens(600))])
            assert cache.peak == max(found) == cache.capacity == CONFIG.budget + config.slack
            compressions.append(cache.compressor.compressions)
    assert compressions[1] <= compressions[0] / 2


@pytest.mark.parametrize("policy", ["recall", "snapkv"])
def test_an_answer_is_compressed_as_without(shallow_model, policy):
    with BudgetedCache(shallow_model, with_policy(policy)) as cache:
        cache.read([Passage("user", tokens(CONFIG.budget + 80))])
        assert cache.ledger.n_cells > ANSWER
        for i, token in enumerate(tokens(80, 1)):
            cache.append(np.array([token]), "decode")
            # the first token finds what was read
            assert cache.ledger.n_cells < ANSWER, i


@pytest.mark.parametrize("policy", ["recall", "snapkv"])
def test_a_given_answer_is_read_as_one_that_is_generated(shallow_model, policy):
    """In pieces that end where it would be compressed; and whoever reads it piece by piece is told how long these are."""
    user, answer = Passage("user", tokens(100)), tokens(90, 1)
    with BudgetedCache(shallow_model, with_policy(policy)) as given, BudgetedCache(shallow_model, with_policy(policy)) as generated:
        found = sizes(given)
        given.read([user, Passage("assistant", answer)])
        assert max(found) == ANSWER
        generated.read([user, Passage("assistant", answer[:1])])
        rest = answer[1:]
        while len(rest):
            piece, rest = np.split(rest, [generated.room_in_answer])
            generated.append(piece, "decode")
        assert given.compressor.compressions == generated.compressor.compressions > 0
        assert given.ledger.n_cells == generated.ledger.n_cells


def test_where_nothing_is_compressed_an_answer_has_all_the_room(shallow_model):
    with BudgetedCache(shallow_model, with_policy("snapkv")) as cache:
        cache.read([Passage("assistant", tokens(ANSWER - 1))])
        assert cache.room_in_answer == 1
        with cache.hold():
            assert cache.room_in_answer == cache.room == 64


def test_text_behind_an_answer_has_the_room_of_texts(shallow_model):
    with BudgetedCache(shallow_model, with_policy("snapkv")) as cache:
        cache.read([Passage("assistant", tokens(ANSWER - 1))])
        cache.read([Passage("user", tokens(TEXT - ANSWER, 1))])
        assert cache.ledger.n_cells == TEXT - 1 and not cache.compressor.compressions


def test_a_policy_that_removes_nothing_has_no_use_for_it(shallow_model):
    config = CacheConfig(policy="full", budget=128, read_stride=512, n_ubatch=64, n_threads=1)
    with BudgetedCache(shallow_model, config) as cache:
        assert cache.capacity == 128 and cache.room_in_answer == 64


def test_it_is_no_smaller_than_the_stride():
    assert CacheConfig(stride=32, read_stride=32).slack == CacheConfig(stride=32).slack == 32
    with pytest.raises(CacheError, match="must be at least the stride of 128"):
        CacheConfig(read_stride=64)
    with pytest.raises(CacheError, match="at least 1"):
        CacheConfig(stride=1, read_stride=0)


def test_what_is_measured_does_not_depend_on_the_device():
    base = replace(CHAT, archive=None)
    assert Variant.parse("snapkv:stride=48", 0.5).config(base).read_stride == 48
    assert Variant.parse("snapkv:read_stride=256", 0.5).config(base).read_stride == 256


@pytest.mark.parametrize("before, after", [(96, None), (None, 96)])
def test_a_conversation_goes_on_where_it_is_another(shallow_model, tmp_path, before, after):
    """As on a machine where its cells lie elsewhere: nothing is read again."""
    snapshots = Snapshots(tmp_path / "kept")
    with ChatSession(shallow_model, replace(CHAT, read_stride=before)) as chat:
        ask(chat, ["One " * 150, "Two?"])
        snapshots.save(chat)
        messages, n_cells = list(chat.messages), chat.kv.used
    with ChatSession(shallow_model, replace(CHAT, read_stride=after)) as chat:
        snapshots.load(chat, messages)
        read_nothing_again(chat)
        assert chat.kv.used == n_cells and chat.messages == messages
        ask(chat, ["Three?"])
        assert chat.kv.peak_cells <= chat.kv.capacity + 96
