"""A chat on layers of the real model: within its budget, without an end, and able to go back."""

import dataclasses

import device
import numpy as np
import pytest

from kvlocal.cache.config import CacheError
from kvlocal.cache.ledger import Ledger
from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.given_answer import read_answer
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import Sampler, SamplingParams
from kvlocal.policies import POLICIES

pytestmark = pytest.mark.device

GREEDY = SamplingParams(temperature=0)
SMALL = SessionConfig(budget=128, stride=32, n_ubatch=64, n_threads=1, max_tokens=24, sampling=GREEDY)
STORY = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. "


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as m:
        yield m


@pytest.fixture(scope="module")
def whole_model(smollm2):
    with Model(smollm2) as m:
        yield m


def session(model, **changes):
    return ChatSession(model, dataclasses.replace(SMALL, **changes))


def check_ledger(chat):
    """Cache and ledger agree; tokens ascend in every head; what is pinned and the window are in every head."""
    ledger, native = chat.cache.ledger, chat.cache.native
    positions = native.positions()
    assert len(positions) == ledger.n_cells == chat.kv.used and (positions >= 0).all()
    assert positions[-1] == ledger.next_position - 1
    tokens = ledger.tokens[..., : ledger.n_cells]
    assert (np.diff(tokens, axis=-1) > 0).all()
    assert (tokens[..., : ledger.n_pinned] == np.arange(ledger.n_pinned)).all()
    n_recent = min(chat.config.window, ledger.n_cells)
    assert (tokens[..., -n_recent:] == np.arange(ledger.n_tokens - n_recent, ledger.n_tokens)).all()
    assert (ledger.positions[..., ledger.n_cells - 1] == ledger.next_position - 1).all()
    assert (np.diff(ledger.positions[..., : ledger.n_cells], axis=-1) > 0).all()


@pytest.mark.parametrize(("policy", "cache"), [("gkv", "f16"), ("streaming", "q8_0"), ("gkv", "q4_0")])
def test_many_turns_stay_within_the_budget(model, policy, cache):
    with session(model, policy=policy, type_k=cache, type_v=cache, system="Answer in one short sentence.") as chat:
        for i in range(12):
            text = "".join(chat.send(f"Question {i}: name a thing that starts with the letter {chr(97 + i)}."))
            assert text == chat.messages[-1]["content"]
            check_ledger(chat)
            assert chat.kv.used <= 128 + 32
        kv = chat.kv
        assert kv.peak_cells <= 128 + 32 <= kv.capacity
        assert kv.history_tokens > 3 * kv.budget and kv.compressions > 4
        assert kv.evicted == kv.history_tokens - kv.used
        assert len(chat.messages) == 24
        system = chat.segments()[0]
        assert system.role == "system" and system.pinned and system.n_cells_min == system.n_tokens
        assert sum(segment.n_tokens for segment in chat.segments()) == kv.history_tokens
        assert sum(segment.n_cells for segment in chat.segments()) == pytest.approx(kv.used)


def test_a_document_many_times_the_budget_is_taken_in_chunks(model):
    seen = []
    chat = ChatSession(model, SMALL, progress=lambda done, total: seen.append((done, total)))
    with chat:
        "".join(chat.send(STORY * 60 + "\nWhat is this about?"))
        assert chat.kv.history_tokens > 9 * chat.kv.budget
        assert chat.kv.peak_cells <= 128 + 32
        check_ledger(chat)
        assert seen[-1][0] == seen[-1][1] == chat.last.prompt_tokens and len(seen) > 15


def test_heads_choose_for_themselves(model):
    with session(model, policy="gkv") as chat:
        "".join(chat.send(STORY * 12))
        tokens = chat.cache.ledger.tokens[..., : chat.kv.used].reshape(-1, chat.kv.used)
        assert len(np.unique(tokens, axis=0)) == len(tokens)


def test_positions_are_rotated_back_before_the_trained_context_ends(model):
    """With a trained context of 512 the chat goes far past it, and every position stays inside."""
    with session(model, policy="kvzip-snapkv") as chat:
        chat.cache.compressor.n_ctx_train = 512
        for _ in range(4):
            "".join(chat.send(STORY * 15))
            check_ledger(chat)
            assert chat.kv.next_position <= 512
        assert chat.kv.rotations >= 2 and chat.kv.history_tokens > 1024


def test_keys_are_where_the_ledger_says_after_rotations(model):
    """A key in the cache is the key of its token, rotated to the position in the ledger: the first layer's depends on the token alone."""
    with session(model, policy="kvzip-snapkv") as chat:
        chat.cache.compressor.n_ctx_train = 400
        "".join(chat.send(STORY * 50))
        assert chat.kv.rotations >= 2
        ledger = chat.cache.ledger
        tokens = np.concatenate([t for _, t in chat.template.tokens(model, chat.template.prefix(None) + chat.template.user_turn([], STORY * 50))])
        keys = chat.cache.native.read_keys(0)
        freq = 100000.0 ** (-np.arange(0, 64, 2) / 64)
        by_token = {}
        for head in range(3):
            for cell in range(chat.kv.used):
                number = ledger.tokens[0, head, cell]
                if number >= len(tokens):
                    continue
                angle = -ledger.positions[0, head, cell] * freq
                a, b = keys[head, cell, 0::2], keys[head, cell, 1::2]
                flat = np.r_[a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
                first = by_token.setdefault((head, tokens[number]), flat)
                np.testing.assert_allclose(flat, first, atol=0.02 * np.abs(first).max())
        assert len(by_token) > 30


def test_before_the_first_compression_answers_are_those_of_the_full_cache(model):
    answers = []
    for policy in ("full", "gkv", "streaming"):
        with session(model, policy=policy, budget=400) as chat:
            answers.append(["".join(chat.send(text)) for text in ("Hello!", "What is the capital of France?")])
    assert answers[0] == answers[1] == answers[2]


def test_undo_and_regenerate_go_back_exactly(model):
    """Also over compressions: the same question gets the same greedy answer, and the cells are the same."""
    for prompt in ("And a fish?", STORY * 20):
        with session(model) as chat:
            for text in ("Name a bird.", "Name a tree.", STORY * 8):
                "".join(chat.send(text))
            before, cells, keys = chat.kv, chat.cache.native.positions(), chat.cache.native.read_keys(5)
            answer = "".join(chat.send(prompt))
            assert [m["role"] for m in chat.undo()] == ["user", "assistant"]
            after = chat.kv
            assert (after.used, after.history_tokens, after.next_position) == (before.used, before.history_tokens, before.next_position)
            np.testing.assert_array_equal(chat.cache.native.positions(), cells)
            np.testing.assert_array_equal(chat.cache.native.read_keys(5), keys)
            check_ledger(chat)
            "".join(chat.send(prompt))
            assert "".join(chat.regenerate()) == answer == chat.messages[-1]["content"]
            assert len(chat.messages) == 8


def test_undo_further_than_one_turn_reads_again(model):
    with session(model) as chat:
        for text in ("Name a bird.", "Name a tree.", "Name a river."):
            "".join(chat.send(text))
        messages = list(chat.messages)
        chat.undo()
        chat.undo()
        assert chat.messages == messages[:2]
        check_ledger(chat)
        chat.undo()
        assert chat.messages == []
        with pytest.raises(SessionError):
            chat.undo()


def test_without_undo_nothing_is_kept_for_it_and_turns_are_taken_back_by_reading_again(model):
    evicting = dataclasses.replace(SMALL, policy="kvzip-snapkv")
    with ChatSession(model, evicting, undo=False) as chat, ChatSession(model, evicting) as usual:
        for text in ("Name a bird.", STORY * 8, "Name a tree."):
            assert "".join(chat.send(text)) == "".join(usual.send(text))
        assert chat.kv.compressions and not len(chat.cache._way_back.copy) and chat.cache.marked == []
        messages = list(chat.messages)
        chat.cache.ledger.compact = raise_interrupt
        with pytest.raises(KeyboardInterrupt):
            chat.add_turn("user", STORY * 20)
        assert chat.messages == messages
        check_ledger(chat)
        chat.undo()
        assert chat.messages == messages[:4]
        check_ledger(chat)


def test_a_stopped_answer_stays_as_far_as_it_came(model):
    with session(model, max_tokens=200) as chat:
        answer, shown = chat.send("Count to one hundred."), ""
        for text in answer:
            shown += text
            if len(shown) > 10:
                chat.stop()
        assert chat.last.stop_reason == "stopped" and chat.messages[-1] == {"role": "assistant", "content": shown}
        closed = chat.send("Again.")
        first = next(closed)
        closed.close()
        assert chat.messages[-1]["content"] == first
        check_ledger(chat)
        assert "".join(chat.send("And now?"))


def test_an_exception_in_an_answer_leaves_the_session_usable(model, monkeypatch):
    with session(model, max_tokens=200, policy="kvzip-snapkv") as chat:
        answer = chat.send("Count to one hundred.")
        next(answer)
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
        check_ledger(chat)
        # in the worst moment: the cache is compacted, the ledger not yet; the second token of the answer makes that due
        used = chat.kv.used
        chat.add_turn("user", "Go on.")
        n_other, due = chat.kv.used - used, SMALL.budget + SMALL.stride
        chat.undo()
        chat.add_turn("user", "Go on." + " on" * (due - 2 - used - n_other))
        assert chat.kv.used == due - 2
        monkeypatch.setattr(Ledger, "compact", once_interrupted(monkeypatch))
        with pytest.raises(KeyboardInterrupt):
            "".join(chat.answer())
        check_ledger(chat)
        assert "".join(chat.send("And now?"))


def test_a_token_that_says_more_than_the_answer_is_read_again_in_part(model, monkeypatch):
    """The end of an answer and the beginning of a stop string can be one token."""
    with session(model) as chat:
        (token,) = model.tokenize(" lighthouse", parse_special=False)[:1]
        text = model.token_bytes(int(token)).decode()
        chat.template.stop_strings = (text[3:],)
        monkeypatch.setattr(Sampler, "sample", lambda self, context, i=-1: self.accept(int(token)) or int(token))
        assert "".join(chat.send("What is this?")) == text[:3]
        assert model.detokenize(chat.cache.ledger.ids).endswith(text[:3])
        check_ledger(chat)


def raise_interrupt(*_):
    raise KeyboardInterrupt


def once_interrupted(monkeypatch):
    def interrupted(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    return interrupted


def test_given_turns_and_generated_ones_make_the_same_cache(whole_model):
    """Up to rounding, as tokens of the one were evaluated one by one: so it takes a model that is sure of what it says."""
    with session(whole_model) as generated, session(whole_model) as given:
        texts = ["Name a bird.", "Name a tree."]
        for text in texts:
            "".join(generated.send(text))
        given.restore(generated.messages)
        assert given.messages == generated.messages
        assert "".join(given.send("Name a river.")) == "".join(generated.send("Name a river."))


def test_system_prompt_can_be_changed_and_is_always_kept(model):
    with session(model) as chat:
        "".join(chat.send("Hello!"))
        chat.set_system("You are a gardener.")
        assert chat.system == "You are a gardener." and len(chat.messages) == 2
        assert chat.segments()[0].text == "You are a gardener."
        with pytest.raises(SessionError, match="shorten it"):
            chat.set_system("word " * 200)
        assert chat.system == "You are a gardener." and len(chat.messages) == 2
        check_ledger(chat)
    with pytest.raises(SessionError, match="give a budget of at least"):
        session(model, system="word " * 200)


def test_the_full_policy_says_when_it_is_full(model):
    with session(model, policy="full", budget=200) as chat:
        "".join(chat.send("Hello!"))
        before = chat.kv
        with pytest.raises(CacheError, match="choose another policy or a larger budget"):
            "".join(chat.send(STORY * 30))
        assert chat.kv.used == before.used and len(chat.messages) == 2
        assert "".join(chat.send("Still there?"))


def test_seeds_repeat_and_clear_starts_again(model):
    sampling = SamplingParams(temperature=1.0, seed=11)
    with session(model, sampling=sampling) as a, session(model, sampling=sampling) as b:
        first = "".join(a.send("Tell me something."))
        assert first == "".join(b.send("Tell me something."))
        # the number of the answer counts, and not how often numbers were drawn
        b.max_tokens = 3
        "".join(b.regenerate())
        b.max_tokens = SMALL.max_tokens
        a.n_answers += 1
        assert "".join(a.regenerate()) == "".join(b.regenerate()) != first
        a.clear()
        assert a.messages == [] and a.kv.history_tokens == a.segments()[0].n_tokens
        assert "".join(a.send("Tell me something.")) == first


def test_impossible_settings_are_refused(model):
    sizes = ({"budget": 20}, {"budget": 0}, {"budget": 8192}, {"stride": 0}, {"window": 65}, {"max_tokens": 0}, {"n_threads": -1})
    for changes in (*sizes, {"policy": "magic"}, {"type_k": "q9"}):
        with pytest.raises(KvlocalError):
            session(model, **changes)
    with session(model) as chat:
        for call in (chat.regenerate, chat.undo, chat.answer, lambda: chat.add_turn("assistant", "x"), lambda: chat.add_turn("tool", "x")):
            with pytest.raises(SessionError):
                call()


def test_sliding_window_model(short_gemma3):
    """Its global layers are compressed; it goes past the window, back by undo, and past a (short) trained context."""
    with Model(short_gemma3) as model, session(model, n_ubatch=128, max_tokens=8, policy="kvzip-snapkv") as chat:
        "".join(chat.send(STORY * 30))
        before, cells, keys = chat.kv, chat.cache.native.positions(), chat.cache.native.read_keys(0)
        assert before.compressions > 2
        "".join(chat.send(STORY * 12))
        chat.undo()
        assert chat.kv.used == before.used
        np.testing.assert_array_equal(chat.cache.native.positions(), cells)
        np.testing.assert_array_equal(chat.cache.native.read_keys(0), keys)
        assert "".join(chat.send("What did the keeper do?"))
        check_ledger(chat)
        chat.cache.compressor.n_ctx_train = 1100
        "".join(chat.send(STORY * 25))
        assert chat.kv.rotations >= 1 and chat.kv.next_position <= 1100
        check_ledger(chat)


def next_logits(chat, text):
    """What the model predicts after a user turn."""
    chat.add_turn("user", text)
    return chat.cache.context.logits()


@pytest.mark.parametrize("policy", ["kvzip", "kvzip-gkv"])
def test_a_second_read_leaves_nothing_but_scores(model, policy):
    """The next logits are the same, bit by bit, with and without it, and so are positions and ledger, also when it is stopped in between."""
    logits, rereads = [], []
    for stops in (None, [], [False, True]):
        with session(model, policy=policy, budget=800) as chat:
            for text in ("Name a bird.", STORY * 4):
                chat.add_turn("user", text)
                chat.add_turn("assistant", "A bird is " + STORY * 3)
                if stops is not None:
                    waits = iter(stops)
                    done = chat.second_read(lambda waits=waits: next(waits, False))
                    assert done == (not stops) and chat.second_read()
            check_ledger(chat)
            rereads.append(chat.cache.ledger.scores("reread").copy())
            before = chat.kv
            logits.append(next_logits(chat, "And a fish?"))
            assert before.evicted == 0 and before.next_position == before.history_tokens
    assert np.isnan(rereads[0]).all()
    n_system = int(np.isnan(rereads[1][0, 0]).sum())
    assert not np.isnan(rereads[1][..., n_system:]).any() and 0 < n_system < 60 and (rereads[1][..., n_system:] <= 1).all()
    np.testing.assert_array_equal(rereads[1], rereads[2])
    for other in logits[1:]:
        np.testing.assert_array_equal(logits[0], other)


def test_idle_off_reads_nothing_again(model):
    with session(model, policy="kvzip", idle=False) as chat:
        chat.add_turn("user", "Name a bird.")
        chat.add_turn("assistant", "An owl.")
        assert chat.second_read() and np.isnan(chat.cache.ledger.scores("reread")).all() and chat.seconds.reread == 0


def test_a_second_read_makes_itself_room(model):
    """Where the cache is nearly full, so that nothing could be read beside it, it is compressed before its time."""
    with session(model, policy="kvzip", budget=192, stride=64) as chat:
        chat.add_turn("user", STORY * 4)
        chat.add_turn("assistant", "A bird.")
        kv = chat.kv
        assert kv.capacity == 256
        chat.add_turn("user", "And " + "so " * (kv.capacity - kv.used - 30) + "on?")
        chat.add_turn("assistant", "Yes.")
        before = chat.kv
        assert before.used > 230
        assert chat.second_read() and chat.cache.ledger.n_reread == chat.kv.history_tokens
        assert chat.kv.compressions == before.compressions + 1
        check_ledger(chat)


def test_the_second_read_finds_what_is_said_again(whole_model):
    """Tokens of the first copy are what a repetition looks at: far more than the window's queries do, in the mean over heads."""
    with session(whole_model, policy="kvzip-gkv", budget=800) as chat:
        chat.add_turn("user", "My locker has the number 7341 and stands in the cellar.")
        chat.add_turn("assistant", "Thank you, I will remember it.")
        chat.second_read()
        start = chat.cache.ledger.segments[1].start
        assert np.nanmean(chat.cache.ledger.scores("reread")[..., start:]) > 3 * chat.cache.native.scores(n_query=16)[..., start:].mean()


def test_hold_gives_everything_back(model):
    """Inside nothing is compressed; afterwards cache, ledger, messages and ring are as before, and reading goes on as if nothing had been."""
    logits = []
    for probes in (False, True):
        with ChatSession(model, dataclasses.replace(SMALL, policy="gkv"), spare=300, n_outputs=SMALL.n_ubatch) as chat:
            chat.add_turn("user", STORY * 8)
            chat.add_turn("assistant", STORY * 2)
            chat.compress()
            before, queries, segments = chat.kv, chat.cache.native.query_positions(), chat.segments()
            if probes:
                with chat.hold():
                    chat.add_turn("user", "Who wrote down the weather?")
                    with chat.hold():
                        first = read_answer(chat, "The keeper of the lighthouse.")
                    with chat.hold():
                        again = read_answer(chat, "The keeper of the lighthouse.")
                    other = read_answer(chat, STORY * 3)
                    assert chat.kv.compressions == before.compressions and chat.kv.used > before.used
                np.testing.assert_array_equal(first[0], again[0])
                np.testing.assert_array_equal(first[1], again[1])
                assert first[1].shape == (len(first[0]), model.n_vocab) and len(other[0]) > 50
                after = chat.kv
                assert (after.used, after.next_position, after.history_tokens) == (before.used, before.next_position, before.history_tokens)
                assert chat.segments() == segments and len(chat.messages) == 2
                np.testing.assert_array_equal(chat.cache.native.query_positions(), queries)
                check_ledger(chat)
            logits.append(next_logits(chat, "And a fish? " + STORY * 5))
    np.testing.assert_array_equal(*logits)


def test_read_answer_predicts_each_token_from_those_before_it(model):
    with ChatSession(model, dataclasses.replace(SMALL, budget=400), spare=200, n_outputs=SMALL.n_ubatch) as chat:
        with chat.hold():
            chat.add_turn("user", "Name the capital of France.")
            tokens, logits = read_answer(chat, "The capital of France is Paris.")
        assert model.detokenize(tokens) == "The capital of France is Paris."
        with chat.hold():
            chat.add_turn("user", "Name the capital of France.")
            for i, token in enumerate(tokens):
                top = np.argsort(-logits[i])[:5]
                np.testing.assert_allclose(chat.cache.context.logits()[top], logits[i][top], atol=device.tolerance(0.6, 1.5))
                chat.cache.append(np.array([token], np.int32), "decode")


def test_a_ratio_lets_the_budget_grow_with_the_conversation(model):
    with session(model, budget=None, ratio=0.7, stride=32) as chat:
        used = []
        for _ in range(4):
            chat.add_turn("user", STORY * 4)
            chat.add_turn("assistant", STORY * 3)
            chat.compress()
            used.append(chat.kv.used)
            check_ledger(chat)
            assert chat.kv.used == chat.kv.budget == max(round(0.3 * chat.kv.history_tokens), chat.cache.ledger.n_pinned + 2 * SMALL.window)
        assert used[3] > used[1] > used[0] and chat.kv.compressions > 4
    with session(model, budget=150, ratio=0.2) as chat:
        chat.add_turn("user", STORY * 20)
        chat.compress()
        assert chat.kv.used == 150


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(CacheError, match="ratio"):
        SessionConfig(ratio=ratio)


def test_positions(model):
    """Cache: kept keys sit at their place after every compression. Original: they never move, and the trained context has an end."""
    with session(model, positions="cache") as chat:
        chat.add_turn("user", STORY * 12)
        assert chat.kv.rotations == chat.kv.compressions > 1
        chat.compress()
        assert chat.kv.next_position == chat.kv.used
        check_ledger(chat)
    with session(model, policy="streaming", positions="original") as chat:
        chat.add_turn("user", STORY * 12)
        assert chat.kv.rotations == 0 < chat.kv.compressions and chat.kv.next_position == chat.kv.history_tokens
        chat.cache.compressor.n_ctx_train = 300
        chat.add_turn("assistant", "Yes.")
        before = chat.kv
        with pytest.raises(KvlocalError, match="original"):
            chat.add_turn("user", STORY * 12)
        assert chat.kv.history_tokens == before.history_tokens and len(chat.messages) == 2
    with pytest.raises(CacheError, match="positions"):
        SessionConfig(positions="elsewhere")


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("full", "nexus", "hybrid")])
def test_every_policy_keeps_a_chat_within_its_budget(model, policy):
    with session(model, policy=policy) as chat:
        for text in ("Name a bird.", STORY * 5, STORY * 4):
            chat.add_turn("user", text)
            chat.add_turn("assistant", "Well. " + STORY * 3)
            chat.second_read()
            check_ledger(chat)
        assert chat.kv.peak_cells <= chat.kv.capacity and chat.kv.compressions > 2


def test_h2o_adds_up_the_attention_of_every_query(model):
    """Before anything is removed, the sums of a layer and head are as many as there were queries: each query's weights add up to 1 or, for the
    largest of a group of heads, a little more."""
    with session(model, policy="h2o", budget=300) as chat:
        chat.add_turn("user", STORY * 12)
        state = chat.cache.sources.state(chat.cache.ledger)
        assert chat.kv.evicted == 0 and chat.cache.ledger.n_summed == chat.kv.history_tokens
        total = state.sums.sum(axis=-1)
        assert (total >= chat.kv.history_tokens - 0.5).all() and (total <= 3 * chat.kv.history_tokens).all()


def test_h2o_in_a_cache_smaller_than_a_micro_batch(model):
    config = SessionConfig(policy="h2o", budget=64, n_threads=1, max_tokens=8, sampling=GREEDY)
    with ChatSession(model, config) as chat:
        assert chat.cache.context.n_ubatch < config.n_ubatch
        "".join(chat.send(STORY * 30))
        assert chat.kv.compressions > 0 and chat.cache.ledger.n_summed > 500
        check_ledger(chat)
