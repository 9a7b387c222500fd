"""What an answer looked at and what was recalled for it, against sums that are made token by token."""

from collections import Counter

import numpy as np
import pytest
from host_keys import row_scores
from recalling import AT_ONCE, CONFIG, tokens

from kvlocal.cache.attention_of_answer import of_cells
from kvlocal.cache.budgeted import BudgetedCache, Passage
from kvlocal.cache.config import CacheConfig
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.looked_at import looked_at, recalled_turns
from kvlocal.chat.session import ChatSession, SessionError
from kvlocal.chat.stats import segment_stats
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams

CHAT = SessionConfig(**vars(CONFIG) | {"sampling": SamplingParams(temperature=0), "max_tokens": 20})
ASKED = [f"Question {i}: name some things that start with the letter {letter}, and say what they are good for." for i, letter in enumerate("abcd")]


@pytest.fixture(scope="module")
def model(three_layers):
    with Model(three_layers) as m:
        yield m


def turn(n, seed=0):
    return [Passage("user", tokens(n, seed), f"turn {seed}"), Passage("assistant", tokens(3, seed + 1))]


class Watched:
    """The choices of a cache, each with the tokens of each head before it."""

    def __init__(self, cache):
        self.cache, self.choices, self.left = cache, [], set()
        recaller = cache.compressor.recaller
        refill = recaller.refill

        def watching(ledger, tokens):
            before = self.held()
            n_query = min(16, len(cache.native.query_positions()))
            scores = row_scores(cache.native, recaller.archive.key_chunks(), ledger.n_tokens, n_query)
            self.choices.append((before, tokens, scores, ledger.segments[-1].role, ledger.n_tokens))
            after = {(layer, head, token) for layer, head in np.ndindex(*tokens.shape[:2]) for token in tokens[layer, head].tolist()}
            self.left |= before - after
            return refill(ledger, tokens)

        recaller.refill = watching

    def held(self):
        ledger = self.cache.ledger
        cells = ledger.tokens[..., : ledger.n_cells]
        return {(layer, head, token) for layer, head in np.ndindex(*cells.shape[:2]) for token in cells[layer, head].tolist()}

    def expected(self):
        """Attention to each segment, to what is pinned, cells that came back, and the most that a head paid to them, of the choices for the last
        answer."""
        ledger = self.cache.ledger
        segment_of = [i for i, segment in enumerate(ledger.segments) for _ in range(segment.start, segment.end)]
        end_of_text = max(choice[4] for choice in self.choices if choice[3] == "user")
        first = min(i for i, choice in enumerate(self.choices) if choice[4] == end_of_text)
        attention, recalled, seen_back, pinned = Counter(), Counter(), Counter(), 0.0
        for before, chosen, scores, *_ in self.choices[first:]:
            n_heads = scores.shape[0] * scores.shape[1]
            for layer, head in np.ndindex(*scores.shape[:2]):
                of_head = Counter()
                for token, score in enumerate(scores[layer, head].tolist()):
                    if token < ledger.n_pinned:
                        pinned += score / n_heads
                    else:
                        attention[segment_of[token]] += score / n_heads
                for token in chosen[layer, head].tolist():
                    if (layer, head, token) not in before:
                        recalled[segment_of[token]] += 1 / n_heads
                        of_head[segment_of[token]] += float(scores[layer, head, token])
                seen_back |= of_head  # the larger of both
        return attention, pinned, recalled, seen_back


def same(found, expected):
    assert len(found) > max(expected, default=0)
    np.testing.assert_allclose(found, [expected[i] for i in range(len(found))], rtol=1e-4, atol=1e-6)


def test_what_choices_saw_is_added_up_by_turns(model):
    with BudgetedCache(model, AT_ONCE) as cache:
        cache.begin(5)
        watched = Watched(cache)
        cache.read([Passage("system", tokens(20)), *turn(100)])
        for seed in (2, 4):
            # also compressed in the middle of the text, which counts for nothing
            cache.read(turn(150, seed))
            for token in tokens(40, seed + 20):
                cache.append(np.array([token]), "decode")
            looked = cache.compressor.looked
            attention, pinned, recalled, seen_back = watched.expected()
            assert sum(choice[3] == "user" for choice in watched.choices) > 2 and watched.choices[-1][3] == "assistant"
            same(looked.attention, attention)
            same(looked.recalled, recalled)
            same(looked.recalled_attention, seen_back)
            assert looked.pinned == pytest.approx(pinned, rel=1e-4) and pinned > 0 and sum(recalled.values()) > 1
        # the cells that are here again, whenever they came
        back = Counter(token for _, _, token in watched.held() & watched.left)
        for segment, stats in zip(cache.ledger.segments, segment_stats(cache), strict=True):
            n_heads = cache.layout.n_layer * cache.layout.n_head_kv
            assert stats.n_recalled == pytest.approx(sum(back[token] for token in range(segment.start, segment.end)) / n_heads)
            assert stats.n_archived == min(segment.end, cache.compressor.recaller.archive.n_tokens) - segment.start
        assert sum(back.values()) > 10


def test_an_answer_that_is_taken_back_has_looked_at_nothing(model):
    with BudgetedCache(model, AT_ONCE) as cache:
        cache.read([Passage("system", tokens(20)), *turn(150)])
        cache.mark()
        n = cache.ledger.n_tokens
        cache.read(turn(40, 2))
        first = cache.compressor.looked.attention.copy()
        assert first.any()
        # the end of an answer is no other answer
        cache.choose_again()
        assert len(cache.compressor.looked.attention) == len(cache.ledger.segments) == 5
        assert cache.set_length(cache.ledger.n_tokens - 2) and cache.compressor.looked.attention.any()
        # nor is one that has not begun
        assert cache.set_length(cache.ledger.n_tokens - 1) and len(cache.compressor.looked.attention) == len(cache.ledger.segments) == 4
        assert recalled_turns(cache) is not None and cache.compressor.looked.attention.any()
        cache.set_length(n)
        assert not cache.compressor.looked.attention.any() and cache.compressor.looked.turn_start == -1
        cache.read(turn(40, 2))
        np.testing.assert_array_equal(cache.compressor.looked.attention, first)


def test_the_turns_that_matter_are_those_that_a_head_looked_at(model):
    with BudgetedCache(model, AT_ONCE) as cache:
        for seed in range(1, 5):
            cache.read(turn(10, seed))
        looked = cache.compressor.looked
        looked.turn_start = cache.ledger.segments[-2].start
        for paid, turns in (
            ([0, 0, 0.9, 0.1, 0, 0, 0.1, 0], [2]),
            ([0.1, 0.1, 0.3, 0.1, 0.4, 0.1, 0.1, 0.1], [2, 3]),
            ([0.06, 0, 0.04, 0.04, 0, 0, 0, 0.07], [1, 4]),
            ([0.04] * 8, []),
            ([0.0, 0.0, 0.3], [2]),
        ):
            looked.recalled_attention = np.array(paid)
            assert recalled_turns(cache) == turns
        # of another answer
        looked.turn_start = 0
        assert recalled_turns(cache) == []


def test_attention_of_the_last_answers_queries_whatever_came_after_it(model):
    config = CacheConfig(budget=256, policy="snapkv", window=32, stride=32, n_ubatch=64, n_threads=1)
    with BudgetedCache(model, config) as cache:
        cache.read([Passage("system", tokens(20)), *turn(60)])
        cache.read([Passage("assistant", tokens(9, 5))])
        n = cache.ledger.n_tokens
        scores = 12 * cache.native.scores(n_query=12)
        before = of_cells(cache.native, cache.layout, cache.ledger)
        np.testing.assert_allclose(before, scores.mean(axis=(0, 1)), rtol=1e-5)
        cache.append_vectors(np.random.default_rng(0).standard_normal((7, model.n_embd)).astype(np.float32), "nexus")
        after = of_cells(cache.native, cache.layout, cache.ledger)
        np.testing.assert_allclose(after[:n], before, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(after[n:], 0, atol=1e-5)
        cache.append_vectors(np.random.default_rng(0).standard_normal((40, model.n_embd)).astype(np.float32), "nexus")
        assert of_cells(cache.native, cache.layout, cache.ledger) is None
        with pytest.raises(SessionError, match="not known any more"):
            looked_at(cache)


def check_shares(looked, turn):
    assert looked.beginning + looked.earlier + looked.current == pytest.approx(1) and min(looked.beginning, looked.current) > 0
    assert sum(part.share for part in looked.parts) == pytest.approx(1)
    assert [part.share for part in looked.parts] == sorted((part.share for part in looked.parts), reverse=True)
    assert {part.turn for part in looked.parts} == set(range(1, turn)) and {part.role for part in looked.parts} == {"user", "assistant"}


def test_a_chat_says_what_its_last_answer_looked_at(smollm2):
    with Model(smollm2) as model, ChatSession(model, CHAT) as chat:
        with pytest.raises(SessionError, match="no answer yet"):
            chat.looked_at()
        recalled = []
        for text in ASKED:
            "".join(chat.send(text))
            recalled.append(chat.last.recalled)
        looked = chat.looked_at()
        assert looked.everything and [part.text for part in looked.parts if (part.turn, part.role) == (2, "user")] == [ASKED[1][:60]]
        check_shares(looked, 4)
        assert recalled[0] == [] and recalled[-1] and set(recalled[-1]) <= {1, 2, 3, 4}
        assert sum(part.recalled for part in looked.parts) > 1
        text, before = chat.messages[-1]["content"], chat.looked_at()
        assert "".join(chat.regenerate()) == text and chat.last.recalled == recalled[-1]
        again = chat.looked_at()
        assert [(part.turn, part.role) for part in again.parts] == [(part.turn, part.role) for part in before.parts]
        assert [part.share for part in again.parts] == pytest.approx([part.share for part in before.parts], abs=0.01)
        chat.undo()
        # the answer before: its choices are forgotten, its queries are not
        looked = chat.looked_at()
        assert not looked.everything
        check_shares(looked, 3)
        chat.add_turn("user", "Hello?")
        with pytest.raises(SessionError, match="no answer yet"):
            chat.looked_at()


TALK = [
    ("Tell me something about rivers.", "Rivers carry water from the mountains to the sea. They shape valleys and feed fields wherever they go."),
    ("How do I cook rice?", "Wash the rice, add twice as much water, bring it to a boil, cover the pot and let it simmer for fifteen minutes."),
    ("Why is the sky blue?", "Sunlight is scattered by the molecules of the air, and blue light is scattered much more than red light is."),
    ("How do bees find their way?", "They remember landmarks and tell each other by dances where flowers are to be found."),
    ("Give me an idea for a walk.", "Take the path along the brook to the old mill, and come back over the hill, from where you see the town."),
]


@pytest.mark.parametrize(
    ("fact", "question", "turn"),
    [("My cat is called Tiger and she is eleven years old.", "What is my cat called?", 4),
     ("The password of the garden shed is 4711.", "What is the password of the garden shed?", 2),
     ("I am allergic to peanuts, so never suggest them.", "What am I allergic to?", 6)],
)  # fmt: skip
def test_the_turn_that_was_asked_for_is_named(smollm2, fact, question, turn):
    config = SessionConfig(**vars(CHAT) | {"budget": 160, "max_tokens": 12})
    with Model(smollm2) as model, ChatSession(model, config) as chat:
        for i in range(1, 13):
            asked, answer = (fact, "Thank you, I will keep that in mind.") if i == turn else TALK[i % len(TALK)]
            chat.add_turn("user", asked)
            chat.add_turn("assistant", answer)
        "".join(chat.send(question))
        assert turn in chat.last.recalled and len(chat.last.recalled) < 12 / 2


def test_without_an_archive_it_is_what_the_cache_holds(smollm2):
    config = SessionConfig(budget=256, policy="snapkv", n_ubatch=64, n_threads=1, sampling=SamplingParams(temperature=0), max_tokens=8)
    with Model(smollm2) as model:
        with ChatSession(model, config) as chat:
            for text in ASKED[:3]:
                "".join(chat.send(text))
            looked = chat.looked_at()
            assert not looked.everything and chat.last.recalled == [] and not any(part.recalled for part in looked.parts)
            check_shares(looked, 3)
            assert chat.looked_at() == looked
        with ChatSession(model, SessionConfig(**vars(config) | {"policy": "streaming"})) as chat:
            "".join(chat.send(ASKED[0]))
            with pytest.raises(SessionError, match="streaming does not look at attention"):
                chat.looked_at()
