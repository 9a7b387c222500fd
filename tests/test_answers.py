"""Answers that were left, stopped, cut off or interrupted: what is in the cache is what was said, and nobody decodes behind another's back."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from doors import write_chat_model

from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.llama.context import Context
from kvlocal.llama.errors import NativeError
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import Sampler, SamplingParams

CONFIG = SessionConfig(budget=64, stride=16, n_ubatch=32, max_tokens=24, n_threads=1, policy="snapkv", sampling=SamplingParams(temperature=0))
QUESTIONS = ("The keeper wrote down the birds.", "Who wrote down what?", "And when?")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_chat_model(path, family=request.param, n_layer=6)
    with Model(path) as loaded:
        yield loaded


@pytest.fixture
def chat(model):
    with ChatSession(model, CONFIG) as session:
        yield session


@pytest.fixture
def other(model):
    with ChatSession(model, CONFIG) as session:
        yield session


def said(chat):
    """The text of all tokens in the conversation, markup left out."""
    return chat.model.detokenize(chat.cache.ledger.ids)


def check_cells(chat):
    """The cache holds what is noted of it, and this is the conversation."""
    cache = chat.cache
    assert not cache.uncertain
    assert cache.native.n_cells() == cache.ledger.n_cells and cache.context.pos_max(0) == cache.ledger.next_position - 1
    text, end = said(chat), 0
    for message in chat.messages:
        end = text.index(message["content"], end) + len(message["content"])
    if chat.messages and chat.messages[-1]["content"]:
        assert end == len(text)


# who may go on


def test_an_answer_that_was_left_does_not_come_back(chat, other):
    left = chat.send(QUESTIONS[0])
    shown = next(left)
    current = chat.send(QUESTIONS[1])
    first = next(current)
    with pytest.raises(SessionError, match="went on without it"):
        next(left)
    answer = first + "".join(current)
    assert [message["content"] for message in chat.messages] == [QUESTIONS[0], shown, QUESTIONS[1], answer]
    check_cells(chat)
    other.restore(chat.messages[:2])
    assert "".join(other.send(QUESTIONS[1])) == answer


@pytest.mark.parametrize("change", ["undo", "clear", "finish_turn", "second_read", "restore", "set_system"])
def test_whatever_changes_the_conversation_ends_the_answer(chat, change):
    "".join(chat.send(QUESTIONS[0]))
    left = chat.send(QUESTIONS[1])
    next(left)
    arguments = {"restore": ([],), "set_system": ("B",)}.get(change, ())
    getattr(chat, change)(*arguments)
    messages, n_tokens = [dict(message) for message in chat.messages], chat.kv.history_tokens
    with pytest.raises(SessionError):
        next(left)
    left.close()
    assert chat.messages == messages and chat.kv.history_tokens == n_tokens


def test_closing_one_that_was_left_changes_nothing(chat):
    left = chat.send(QUESTIONS[0])
    next(left)
    answer = "".join(chat.send(QUESTIONS[1]))
    last, segments = chat.last, chat.segments()
    left.close()
    assert chat.last is last and chat.segments() == segments and chat.messages[-1]["content"] == answer


def test_an_answer_that_nobody_reads_does_not_block_the_next_turn(chat, other):
    chat.send(QUESTIONS[0])
    assert chat.last is None or chat.last.stop_reason == "stopped"
    answer = "".join(chat.send(QUESTIONS[1]))
    assert [message["content"] for message in chat.messages] == [QUESTIONS[0], "", QUESTIONS[1], answer]
    check_cells(chat)


def test_the_token_that_is_on_its_way_when_an_answer_is_stopped_is_not_said(chat, other, monkeypatch):
    """Ctrl-C comes nearly always while a token is evaluated."""
    scripted(monkeypatch, chat.model, b"abcdef")
    append, seen = chat.cache.append, []

    def append_and_stop(*arguments):
        append(*arguments)
        if len(seen) == 3:
            chat.stop()

    answer = chat.send(QUESTIONS[0], AnswerOptions(top_logprobs=0))
    monkeypatch.setattr(chat.cache, "append", append_and_stop)
    seen.extend(next(answer) for _ in range(3))
    assert list(answer) == []
    monkeypatch.undo()
    assert chat.messages[-1]["content"] == "".join(seen) == "abc"
    assert chat.last.stop_reason == "stopped" and chat.last.answer_tokens == len(chat.last.drawn) == len(chat.last.logprobs)
    check_cells(chat)
    # and the chat goes on as one does that had been told to say so much
    other.add_turn("user", QUESTIONS[0])
    other.add_answer("".join(seen), chat.last.drawn)
    assert np.array_equal(chat.cache.ledger.ids, other.cache.ledger.ids)


def test_stop_before_the_first_token_counts(model):
    stops = [True]
    with ChatSession(model, CONFIG, progress=lambda done, total: stops and chat.stop()) as chat:
        assert "".join(chat.send("so " * 100)) == "" and chat.last.stop_reason == "stopped"
        stops.clear()
        answer = chat.send(QUESTIONS[0])
        chat.stop()
        assert list(answer) == [] and chat.messages[-1]["content"] == ""
        # one that comes too late is not for the next answer
        chat.stop()
        chat.add_turn("user", QUESTIONS[1])
        assert "".join(chat.answer()) and chat.last.stop_reason != "stopped"


# what is in the cache is what was said


def scripted(monkeypatch, model, data):
    """From now on the tokens of these bytes are drawn, one after another."""
    tokens = [next(t for t in range(model.n_vocab) if model.token_bytes(t) == bytes([byte])) for byte in data]

    def sample(self, context, i=-1):
        context.check_output(i)
        self.recent.append(tokens[0])
        return tokens.pop(0)

    monkeypatch.setattr(Sampler, "sample", sample)


@pytest.mark.parametrize("data", [b"a bird\n### User:", b"\n### User:", b"a bird\n\n### User:"])
def test_a_stop_string_does_not_stay_in_the_cache(chat, other, monkeypatch, data):
    """Neither now nor where the answer is added as it was drawn; and the conversation goes on as if it had never been drawn."""
    chat.template.stop_strings = other.template.stop_strings = ("\n### User:",)
    for session in (chat, other):
        "".join(session.send(QUESTIONS[0]))
    with monkeypatch.context() as drawing:
        scripted(drawing, chat.model, data)
        answer = "".join(chat.send(QUESTIONS[1]))
    assert answer == data.decode().removesuffix("\n### User:") and chat.last.stop_reason == "end"
    assert chat.last.answer_tokens == len(answer) and said(chat).endswith(answer) and "###" not in said(chat)
    check_cells(chat)
    other.add_turn("user", QUESTIONS[1])
    other.add_answer(answer, chat.last.drawn)
    for name, array in chat.cache.snapshot().items():
        np.testing.assert_array_equal(array, other.cache.snapshot()[name])
    assert "".join(other.send(QUESTIONS[2])) == "".join(chat.send(QUESTIONS[2]))


@pytest.mark.parametrize("n", [3, 4, 5])
def test_an_answer_is_cut_between_characters(chat, monkeypatch, n):
    scripted(monkeypatch, chat.model, "ab\N{SLIGHTLY SMILING FACE}".encode())
    chat.max_tokens = n
    assert "".join(chat.send(QUESTIONS[0])) == "ab" == chat.messages[-1]["content"]
    assert chat.last.stop_reason == "length" and chat.last.answer_tokens == 2
    check_cells(chat)


def test_an_answer_that_is_closed_within_a_stop_string_is_cut_before_it(chat, monkeypatch):
    scripted(monkeypatch, chat.model, b"ab\n#\n")
    chat.template.stop_strings = ("\n### User:",)
    answer = chat.send(QUESTIONS[0])
    # the second line break, which can begin a stop string, has been evaluated when the first turns out to begin none
    assert [next(answer) for _ in range(3)] == ["a", "b", "\n#"]
    answer.close()
    assert chat.messages[-1]["content"] == "ab\n#"
    check_cells(chat)


@pytest.mark.parametrize("stopped", [True, False])
def test_an_answer_that_ends_within_a_stop_string_is_cut_before_it(chat, monkeypatch, stopped):
    """At max_tokens and at stop(), as where it is closed."""
    scripted(monkeypatch, chat.model, b"ab\n###c")
    chat.template.stop_strings = ("\n### User:",)
    chat.max_tokens = 6 if stopped else 5
    answer, append = chat.send(QUESTIONS[0]), chat.cache.append
    assert [next(answer), next(answer)] == ["a", "b"]
    if stopped:
        monkeypatch.setattr(chat.cache, "append", lambda *arguments: (append(*arguments), chat.stop()))
    assert list(answer) == []
    assert chat.messages[-1]["content"] == "ab" and chat.last.stop_reason == ("stopped" if stopped else "length")
    check_cells(chat)


# what is not certain is not used


def break_compaction(monkeypatch, cache):
    """The next compaction fails in the middle, as where a device is lost: the first layers are moved, the others not, and no cell is freed."""
    compact = cache.native.compact

    def fails(gather, positions, delta=None):
        monkeypatch.undo()
        n_cells, n_layer = cache.ledger.n_cells, cache.layout.n_layer
        half = np.broadcast_to(np.arange(n_cells, dtype=np.int32), (*gather.shape[:2], n_cells)).copy()
        half[: n_layer // 2 or 1, :, : gather.shape[2]] = gather[: n_layer // 2 or 1]
        compact(half, cache.native.positions())
        raise NativeError("a backend failed", -5)

    monkeypatch.setattr(cache.native, "compact", fails)


@pytest.mark.parametrize("phase", ["prompt", "answer", "idle"])
@pytest.mark.parametrize("undo", [True, False])
def test_a_cache_that_was_left_in_a_compaction_is_not_used(model, monkeypatch, phase, undo):
    with ChatSession(model, CONFIG, undo=undo) as chat, ChatSession(model, CONFIG, undo=undo) as other:
        "".join(chat.send(QUESTIONS[0]))
        if phase == "answer":
            chat.add_turn("user", "so " * (80 - chat.kv.used - 20))
        break_compaction(monkeypatch, chat.cache)
        with pytest.raises(NativeError):
            if phase == "prompt":
                chat.add_turn("user", "so " * 100)
            elif phase == "answer":
                chat.max_tokens = 100
                "".join(chat.answer())
                pytest.fail("it was not compressed")
            else:
                chat.compress()
                chat.cache.compressor.budget = 40
                chat.compress()
        chat.max_tokens = CONFIG.max_tokens
        chat.cache.compressor.budget = CONFIG.budget
        messages = [dict(message) for message in chat.messages]
        if phase == "prompt" and undo:
            # the turn was taken back
            "".join(other.send(QUESTIONS[0]))
        elif phase == "answer" and undo:
            # the turn alone was read again
            "".join(other.send(QUESTIONS[0]))
            for message in messages[2:]:
                other.add_turn(message["role"], message["content"])
        else:
            other.restore(messages)
        assert "".join(chat.send(QUESTIONS[1])) == "".join(other.send(QUESTIONS[1]))
        assert chat.messages[: len(messages)] == messages
        check_cells(chat)


def test_nothing_is_lost_when_reading_again_fails_too(chat, monkeypatch):
    "".join(chat.send(QUESTIONS[0]))
    messages = [dict(message) for message in chat.messages]
    chat.cache.doubt()
    with monkeypatch.context() as broken:
        broken.setattr(Context, "decode", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chat.send(QUESTIONS[1])
    assert chat.messages == messages and chat.cache.uncertain and chat.second_read()
    "".join(chat.send(QUESTIONS[1]))
    assert chat.messages[:2] == messages
    check_cells(chat)


@pytest.mark.parametrize("undo", [True, False])
def test_what_fails_in_a_hold_leaves_the_conversation_as_it_was(model, monkeypatch, undo):
    """Also where the conversation was read again inside."""
    with ChatSession(model, CONFIG, spare=60, undo=undo) as chat, ChatSession(model, CONFIG, spare=60, undo=undo) as other:
        for session in (chat, other):
            session.add_turn("user", QUESTIONS[0])
            session.add_turn("assistant", "so " * 30)
        messages, decode = [dict(message) for message in chat.messages], Context.decode
        calls = []

        def fails_once(context, *args, **options):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            decode(context, *args, **options)

        with monkeypatch.context() as broken:
            broken.setattr(Context, "decode", fails_once)
            with pytest.raises(KeyboardInterrupt), chat.hold():
                chat.add_turn("user", QUESTIONS[1] * 2)
        assert len(calls) >= 2 and chat.messages == messages
        assert "".join(chat.send(QUESTIONS[2])) == "".join(other.send(QUESTIONS[2]))
        check_cells(chat)


# nothing stays open


def test_a_session_that_cannot_be_made_leaves_nothing_open(model):
    gc.collect()
    gc.disable()
    try:
        n_contexts = len(model.contexts)
        for changes in ({"system": "word " * 200}, {"policy": "nexus"}):
            with pytest.raises(KvlocalError):
                ChatSession(model, dataclasses.replace(CONFIG, **changes))
            assert [context.closed for context in model.contexts].count(False) == n_contexts
    finally:
        gc.enable()


def test_a_session_goes_without_the_garbage_collector(model):
    gc.collect()
    gc.disable()
    try:
        session = ChatSession(model, CONFIG)
        "".join(session.send("so " * 100))
        gone = [weakref.ref(part) for part in (session, session.cache, session.cache.context)]
        del session
        assert [part() for part in gone] == [None] * 3
    finally:
        gc.enable()
