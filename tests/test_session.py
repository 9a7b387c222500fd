"""A chat on the real model: within its budget, without an end, and able to go back."""

import dataclasses

import numpy as np
import pytest

from kvlocal.engine import Model
from kvlocal.errors import KvlocalError
from kvlocal.sampling import SamplingParams
from kvlocal.session import ChatSession, SessionConfig, SessionError

GREEDY = SamplingParams(temperature=0)
SMALL = SessionConfig(budget=128, stride=32, n_ubatch=64, max_tokens=24, sampling=GREEDY)
STORY = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. "


@pytest.fixture(scope="module")
def model(smollm2):
    with Model(smollm2) as m:
        yield m


def session(model, **changes):
    return ChatSession(model, dataclasses.replace(SMALL, **changes))


def check_ledger(chat):
    """Cache and ledger agree; tokens ascend in every head; what is pinned and the window are in every head."""
    ledger, native = chat._ledger, chat._native
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


@pytest.mark.parametrize("policy", ["gkv", "streaming"])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_many_turns_stay_within_the_budget(model, policy, cache):
    with session(model, policy=policy, type_k=cache, type_v=cache, system="Answer in one short sentence.") as chat:
        for i in range(9):
            text = "".join(chat.send(f"Question {i}: name a thing that starts with the letter {chr(97 + i)}."))
            assert text == chat.messages[-1]["content"]
            check_ledger(chat)
            assert chat.kv.used <= 128 + 32
        kv = chat.kv
        assert kv.peak_cells <= 128 + 32 + 64 <= kv.capacity
        assert kv.history_tokens > 3 * kv.budget and kv.compressions > 4
        assert kv.evicted == kv.history_tokens - kv.used
        assert len(chat.messages) == 18
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
        assert chat.kv.peak_cells <= 128 + 32 + 64
        check_ledger(chat)
        assert seen[-1][0] == seen[-1][1] == chat.last.prompt_tokens and len(seen) > 15


def test_heads_choose_for_themselves(model):
    with session(model) as chat:
        "".join(chat.send(STORY * 12))
        tokens = chat._ledger.tokens[..., : chat.kv.used].reshape(-1, chat.kv.used)
        assert len(np.unique(tokens, axis=0)) == len(tokens)


def test_positions_are_rotated_back_before_the_trained_context_ends(model):
    """With a trained context of 512 the chat goes far past it, and every position stays inside."""
    with session(model) as chat:
        chat._compressor.n_ctx_train = 512
        for _ in range(4):
            "".join(chat.send(STORY * 15))
            check_ledger(chat)
            assert chat.kv.next_position <= 512
        assert chat.kv.rotations >= 2 and chat.kv.history_tokens > 1024


def test_keys_are_where_the_ledger_says_after_rotations(model):
    """A key in the cache is the key of its token, rotated to the position in the ledger: the first layer's depends on the token alone."""
    with session(model) as chat:
        chat._compressor.n_ctx_train = 400
        "".join(chat.send(STORY * 50))
        assert chat.kv.rotations >= 2
        ledger = chat._ledger
        tokens = np.concatenate([t for _, t in chat.template.tokens(model, chat.template.prefix(None) + chat.template.user_turn([], STORY * 50))])
        keys = chat._native.read_keys(0)
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
            before, cells, keys = chat.kv, chat._native.positions(), chat._native.read_keys(5)
            answer = "".join(chat.send(prompt))
            assert [m["role"] for m in chat.undo()] == ["user", "assistant"]
            after = chat.kv
            assert (after.used, after.history_tokens, after.next_position) == (before.used, before.history_tokens, before.next_position)
            np.testing.assert_array_equal(chat._native.positions(), cells)
            np.testing.assert_array_equal(chat._native.read_keys(5), keys)
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


def test_an_exception_in_an_answer_leaves_the_session_usable(model):
    with session(model, max_tokens=200) as chat:
        answer = chat.send("Count to one hundred.")
        next(answer)
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
        check_ledger(chat)
        # in the worst moment: the cache is compacted, the ledger not yet
        chat._ledger.compact, interrupted = raise_interrupt, False
        try:
            "".join(chat.send("Go on."))
        except KeyboardInterrupt:
            interrupted = True
        assert interrupted
        check_ledger(chat)
        assert "".join(chat.send("And now?"))


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_given_turns_and_generated_ones_make_the_same_cache(model):
    with session(model) as generated, session(model) as given:
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
        with pytest.raises(SessionError, match="choose another policy or a larger budget"):
            "".join(chat.send(STORY * 30))
        assert chat.kv.used == before.used and len(chat.messages) == 2
        assert "".join(chat.send("Still there?"))


def test_seeds_repeat_and_clear_starts_again(model):
    sampling = SamplingParams(temperature=1.0, seed=11)
    with session(model, sampling=sampling) as a, session(model, sampling=sampling) as b:
        first = "".join(a.send("Tell me something."))
        assert first == "".join(b.send("Tell me something."))
        a.clear()
        assert a.messages == [] and a.kv.history_tokens == a.segments()[0].n_tokens
        assert "".join(a.send("Tell me something.")) == first


def test_impossible_settings_are_refused(model):
    for changes in ({"budget": 20}, {"budget": 0}, {"budget": 8192}, {"stride": 0}, {"window": 65}, {"max_tokens": 0}, {"policy": "magic"}, {"type_k": "q4_0"}):
        with pytest.raises(KvlocalError):
            session(model, **changes)
    with session(model) as chat:
        for call in (chat.regenerate, chat.undo, chat.answer, lambda: chat.add_turn("assistant", "x"), lambda: chat.add_turn("tool", "x")):
            with pytest.raises(SessionError):
                call()


def test_sliding_window_model(gemma3):
    """Its global layers are compressed; it goes past the window, back by undo, and past a (short) trained context."""
    with Model(gemma3) as model, session(model, n_ubatch=128) as chat:
        "".join(chat.send(STORY * 30))
        before, cells, keys = chat.kv, chat._native.positions(), chat._native.read_keys(0)
        assert before.compressions > 2
        "".join(chat.send(STORY * 12))
        chat.undo()
        assert chat.kv.used == before.used
        np.testing.assert_array_equal(chat._native.positions(), cells)
        np.testing.assert_array_equal(chat._native.read_keys(0), keys)
        assert "".join(chat.send("What did the keeper do?"))
        check_ledger(chat)
        chat._compressor.n_ctx_train = 1500
        "".join(chat.send(STORY * 50))
        assert chat.kv.rotations >= 1 and chat.kv.next_position <= 1500
        check_ledger(chat)
