"""With an archive every earlier turn of a conversation is come back to at once, and exactly: nothing is read again and nothing is copied."""

import dataclasses

import numpy as np
import pytest
import recalling
from recalling import CHAT, STORY, ask, lasting, read_nothing_again, rows_of, session
from tiny_model import write_tiny_model

from kvlocal.cache.budgeted import BudgetedCache, Passage
from kvlocal.cache.config import CacheConfig
from kvlocal.cache.marks import ArchivedMark, pack, unpack
from kvlocal.chat.config import SessionError
from kvlocal.chat.session import ChatSession
from kvlocal.llama.model import Model

ASKED = ["Name a bird.", STORY * 6, "Why?", STORY * 3 + "What did the keeper write down?", "Name a tree.", "And a river?"]
MORE = ["Go on.", STORY * 4 + "Who wrote?", "When?"]



def state(chat):
    """All that what comes next depends on."""
    archive, shape = chat.cache.compressor.recaller.archive, chat.cache.ledger.tokens.shape[:2]
    every = np.broadcast_to(np.arange(archive.n_tokens), (*shape, archive.n_tokens))
    return recalling.state(chat) | {"archived": rows_of(archive, every).k}


def check_equal(one, other):
    assert one.messages == other.messages and lasting(one.segments()) == lasting(other.segments())
    others = state(other)
    for name, array in state(one).items():
        if name != "archived":  # up to where what came since the last choice begins
            np.testing.assert_array_equal(array, others[name], err_msg=name)
    n = min(len(array[0][0]) for array in (state(one)["archived"], others["archived"]))
    np.testing.assert_array_equal(state(one)["archived"][:, :, :n], others["archived"][:, :, :n])


@pytest.mark.parametrize(("depth", "kind"), [(1, "f16"), (2, "q8_0"), (4, "f16"), (6, "f16")])
def test_answers_are_those_of_a_conversation_that_never_had_the_turns(shallow_model, depth, kind):
    """Over compressions and choices in answers, and though the next text is shorter than the window whose queries choose."""
    with session(shallow_model, type_k=kind, type_v=kind) as chat, session(shallow_model, type_k=kind, type_v=kind) as other:
        ask(chat, ASKED)
        assert chat.kv.compressions > 4 and chat.last.answer_tokens > 16 and len(chat.cache.marked) == 6
        messages = list(chat.messages)
        read_nothing_again(chat)
        assert chat.undo(depth) == messages[-2 * depth :]
        ask(other, ASKED[:-depth])
        check_equal(chat, other)
        assert ask(chat, MORE) == ask(other, MORE)
        check_equal(chat, other)


def test_turn_by_turn_and_on_again(shallow_model):
    with session(shallow_model) as chat, session(shallow_model) as other:
        answers = ask(chat, ASKED)
        read_nothing_again(chat)
        assert "".join(chat.regenerate()) == answers[-1]
        for _ in range(3):
            chat.undo()
        assert ask(chat, ASKED[3:5]) == answers[3:5]
        chat.undo(2)
        chat.undo()
        ask(chat, MORE[:1])
        chat.undo()
        assert ask(chat, MORE) == ask(other, ASKED[:2] + MORE)[2:]
        check_equal(chat, other)
        for n in (0, 6):
            with pytest.raises(SessionError, match="give 1 to 5"):
                chat.undo(n)
        chat.undo(5)
        assert chat.messages == [] and chat.kv.history_tokens == chat.segments()[0].n_tokens
        with pytest.raises(SessionError, match="nothing to undo"):
            chat.undo()
        assert ask(chat, ASKED) == answers


def test_nothing_is_copied(shallow_model):
    with ChatSession(shallow_model, CHAT, spare=200) as chat:
        chat.cache.context.state_get = None
        ask(chat, ASKED[:4])
        with chat.hold():
            ask(chat, ["A word."])
        chat.undo(2)
        assert not len(chat.cache._way_back.copy) and chat.cache._way_back.checkpoint is None


def test_what_is_held_comes_back_with_its_marks(shallow_model):
    config = dataclasses.replace(CHAT, max_tokens=8)
    with ChatSession(shallow_model, config, spare=200) as chat, ChatSession(shallow_model, config, spare=200) as other:
        for one in (chat, other):
            ask(one, ASKED[:3])
        with chat.hold():
            ask(chat, ["Well."])
            with chat.hold():
                ask(chat, ["No.", "Yes."])
        check_equal(chat, other)
        with chat.hold():
            chat.cache.append(np.array([500], np.int32), "decode")
        check_equal(chat, other)
        chat.undo(2)
        other.undo(2)
        assert ask(chat, MORE) == ask(other, MORE)


def test_a_turn_that_fails_is_taken_back_from_the_archive(shallow_model, monkeypatch):
    """In the worst moment: the cells are exchanged, the ledger not yet."""
    with session(shallow_model) as chat, session(shallow_model) as other:
        for one in (chat, other):
            ask(one, ASKED[:4])
        read_nothing_again(chat)

        def interrupt(*_):
            raise KeyboardInterrupt

        for fails in (lambda: chat.add_turn("user", STORY * 5), lambda: ask(chat, ["Name a tree."])):
            with monkeypatch.context() as patched:
                patched.setattr(chat.cache.ledger, "refill", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    fails()
            if chat.messages[-1]["role"] == "user":
                chat.undo()
            check_equal(chat, other)
        assert ask(chat, MORE) == ask(other, MORE)
        # an answer that fails is read again from the beginning of its turn, as far as it came
        answer = chat.send("Count to one hundred.")
        next(answer)
        chat.cache.doubt()
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
        assert not chat.cache.uncertain and chat.messages[-1]["content"]
        chat.undo()
        check_equal(chat, other)


def test_without_its_archive_the_conversation_is_read_again(shallow_model):
    with session(shallow_model, archive_ram=2**20) as chat:
        ask(chat, ASKED)
        assert chat.cache.compressor.recaller is None and "filled the" in chat.kv.archive_lost and len(chat.cache.marked) == 1
        messages = list(chat.messages)
        chat.undo(4)
        assert chat.messages == messages[:4] and chat.cache.compressor.recaller
        chat.undo()
        assert chat.messages == messages[:2] and ask(chat, MORE)


def test_marks_in_a_file(shallow_model, tmp_path):
    with session(shallow_model, archive="disk", archive_ram=0, archive_dir=tmp_path) as chat, session(shallow_model) as other:
        assert ask(chat, ASKED) == ask(other, ASKED)
        chat.undo(3)
        other.undo(3)
        n_bytes = chat.kv.archive_bytes
        assert n_bytes[0] == 0 < n_bytes[1]
        assert ask(chat, MORE) == ask(other, MORE)
        check_equal(chat, other)
        # marks that are gone leave their place to others
        chat.undo(3)
        ask(chat, MORE)
        assert chat.kv.archive_bytes == n_bytes or len(chat.cache.compressor.recaller.archive.key_chunks()) > 4
        assert list(tmp_path.iterdir()) == []


def test_a_sliding_window_is_copied_as_without_an_archive(tmp_path):
    write_tiny_model(tmp_path / "tiny.gguf", "gemma3", n_layer=12)
    config = CacheConfig(budget=96, policy="recall", stride=32, n_ubatch=64, n_threads=1, archive="ram")
    with Model(tmp_path / "tiny.gguf") as tiny, BudgetedCache(tiny, config) as cache:
        lengths = []
        for turn in range(3):
            tokens = np.random.default_rng(turn).integers(0, tiny.n_vocab, 93).astype(np.int32)
            lengths.append(cache.ledger.n_tokens)
            cache.mark()
            cache.read([Passage("user", tokens[:90]), Passage("assistant", tokens[90:])])
        assert len(cache._way_back.copy) and cache.marked == lengths[-1:]
        assert cache.set_length(lengths[-1]) and not cache.set_length(lengths[-2])


def test_marks_are_small_and_say_what_was_there():
    rng = np.random.default_rng(0)
    far = np.sort(rng.permuted(np.broadcast_to(np.arange(100_000), (6, 100_000)), axis=1)[:, :512]).reshape(2, 3, 512)
    tokens = np.concatenate([far, np.broadcast_to(np.arange(100_000, 100_640), (2, 3, 640))], axis=-1).astype(np.int32)
    packed = pack(tokens)
    np.testing.assert_array_equal(unpack(packed, tokens.shape), tokens)
    assert len(packed) < tokens.nbytes / 4
    assert unpack(pack(tokens[..., :0]), (2, 3, 0)).shape == (2, 3, 0)
    damaged = packed.copy()
    damaged[len(damaged) // 2 :] ^= 0x55
    for data, shape in ((packed, (2, 3, 5)), (packed, (2, 3, 5000)), (damaged, tokens.shape), (packed[:9], tokens.shape), (packed[:0], tokens.shape)):
        with pytest.raises(ValueError):
            unpack(data, shape)
    for wrong in (tokens[..., ::-1], tokens - 1, tokens + 1):
        mark = ArchivedMark(100_640, tokens.shape[-1], 100_640, (0,), 0, pack(np.ascontiguousarray(wrong)))
        with pytest.raises(ValueError):
            mark.tokens(2, 3)
