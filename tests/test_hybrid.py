"""Hybrid models: their attention layers are compressed and archived, and their recurrent state comes back with the conversation."""

import json
from functools import partial

import numpy as np
import pytest
import recalling
from click.testing import CliRunner
from hybrid_model import LAYERS, N_HEAD, N_HEAD_KV, write_hybrid_model
from recalling import CHAT, STORY, ask, read_nothing_again, session
from test_slots import OPTIONS, together

from kvlocal.batch.run import run_batch
from kvlocal.benchmark.readers import PlainReader
from kvlocal.benchmark.script import Script
from kvlocal.cache import archived_cells
from kvlocal.cache.evaluate_again import SecondEvaluation
from kvlocal.cache.second_read import SecondRead
from kvlocal.chat.session import ChatSession
from kvlocal.chat.text_session import TextSession
from kvlocal.conversations.snapshot import Snapshots
from kvlocal.doctor.model_facts import model_facts
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container
from kvlocal.gguf.recurrent import Recurrent
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.errors import EngineError
from kvlocal.llama.model import Model
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import AnswerRequest
from kvlocal_cli.main import main

FAMILIES = ("lfm2", "granitehybrid", "qwen3next")
ASKED = ["Name a bird.", STORY * 6, "Why?", STORY * 3 + "What did the keeper write down?", "Name a tree.", "And a river?"]
MORE = ["Go on.", STORY * 4 + "Who wrote?", "When?"]


@pytest.fixture(scope="module")
def files(smollm2, tmp_path_factory):
    """One of each family."""
    directory = tmp_path_factory.mktemp("hybrid")
    for family in FAMILIES:
        write_hybrid_model(smollm2, directory / f"{family}.gguf", family)
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def model(files, request):
    with Model(files / f"{request.param}.gguf") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def lfm2(files):
    """The smallest of them, for what does not depend on what its layers are."""
    with Model(files / "lfm2.gguf") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tokens(model):
    """Random ones of its vocabulary, int32 [600]."""
    return np.random.default_rng(7).integers(100, model.n_vocab, 600).astype(np.int32)


def state(chat):
    """All that what comes next depends on."""
    return recalling.state(chat) | {"recurrent": chat.cache.context.recurrent_state()}


def check_equal(one, other):
    assert one.messages == other.messages and not one.cache.uncertain
    others = state(other)
    for name, array in state(one).items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


# cells


def test_the_layers_with_attention_are_those_of_the_cache(model, tokens):
    with Context(model, n_cells=512, n_ubatch=64, n_threads=1, n_recorded=16) as context:
        native = NativeCache(context.pointer)
        for start in range(0, 256, 64):
            context.decode(tokens[start : start + 64], start)
        layout = native.layout()
        assert layout.is_recurrent and not layout.is_swa and (layout.n_head, layout.n_head_kv) == (N_HEAD, N_HEAD_KV)
        assert native.layer_ids().tolist() == [i for i, n in enumerate(LAYERS) if n]
        scores = native.scores()
        assert scores.shape == (2, N_HEAD_KV, 256)
        for layer in range(layout.n_layer):
            # G-KV, section Scores: the softmax of the recorded queries, the largest of a group, the mean over the queries
            keys, queries = native.read_keys(layer), native.read_queries(layer)
            logits = np.einsum("qhd,hkd->hqk", queries, np.repeat(keys, N_HEAD // N_HEAD_KV, axis=0)) * native.kq_scale(layer)
            logits[:, np.arange(256) > native.query_positions()[:, None]] = -np.inf
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            expected = weights.reshape(N_HEAD_KV, -1, 16, 256).max(axis=1).mean(axis=1)
            np.testing.assert_allclose(scores[layer], expected, atol=1e-3)


def test_where_nothing_is_removed_the_logits_are_those_of_llama_cpp(model, tokens):
    with session(model, budget=700) as chat, Context(model, n_cells=1024, n_ubatch=64, n_threads=1) as plain:
        chat.cache.begin(0)
        chat.cache.ledger.begin_segment("user")
        for start in range(0, 320, 64):
            chat.cache.append(tokens[start : start + 64])
            plain.decode(tokens[start : start + 64], start)
            np.testing.assert_array_equal(chat.cache.context.logits(), plain.logits())
        assert chat.kv.compressions == 0


@pytest.mark.parametrize("archive", ["ram", "off"])
def test_compression_leaves_the_recurrent_state(model, tokens, archive):
    with session(model, budget=700, archive=archive) as whole, session(model, archive=archive) as chat:
        for one in (whole, chat):
            one.cache.begin(0)
            one.cache.ledger.begin_segment("user")
            one.cache.append(tokens[:64])
            one.cache.append(tokens[64:120])
        before = chat.cache.context.recurrent_state()
        chat.cache.compress()
        assert chat.kv.used == 96 and chat.kv.compressions == 1
        np.testing.assert_array_equal(chat.cache.context.recurrent_state(), before)
        for one in (whole, chat):
            one.cache.append(tokens[120:130])
        # the cells that are gone are missed
        assert np.abs(chat.cache.context.logits() - whole.cache.context.logits()).max() > 0.01


# the way back


@pytest.mark.parametrize(("depth", "kind"), [(1, "f16"), (2, "q8_0"), (4, "f16"), (6, "f16")])
def test_answers_are_those_of_a_conversation_that_never_had_the_turns(model, depth, kind):
    """Over compressions and choices in answers, bit for bit, with the recurrent state."""
    with session(model, type_k=kind, type_v=kind) as chat, session(model, type_k=kind, type_v=kind) as other:
        ask(chat, ASKED)
        assert chat.kv.compressions > 4 and len(chat.cache.marked) == 6
        messages = list(chat.messages)
        read_nothing_again(chat)
        assert chat.undo(depth) == messages[-2 * depth :]
        ask(other, ASKED[:-depth])
        check_equal(chat, other)
        assert ask(chat, MORE) == ask(other, MORE)
        check_equal(chat, other)


def test_regenerated_answers_are_the_same(lfm2):
    with session(lfm2) as chat:
        answers = ask(chat, ASKED[:4])
        read_nothing_again(chat)
        assert "".join(chat.regenerate()) == answers[-1]
        chat.undo(2)
        assert ask(chat, ASKED[2:4]) == answers[2:]


@pytest.mark.parametrize("policy", ["kvzip-snapkv", "streaming", "full"])
def test_without_an_archive_the_last_turn_comes_back(model, policy):
    changes = {"policy": policy, "archive": "off", "budget": 96 if policy != "full" else 900}
    with session(model, **changes) as chat, session(model, **changes) as other:
        ask(chat, ASKED[:4])
        read_nothing_again(chat)
        chat.undo()
        ask(other, ASKED[:3])
        other.cache.mark()
        chat.cache.mark()
        check_equal(chat, other)
        assert ask(chat, MORE[:2]) == ask(other, MORE[:2])
        assert (chat.kv.compressions > 2) == (policy != "full")


def test_turns_without_a_mark_are_read_again(lfm2, monkeypatch):
    """What marks may take is bounded; what is forgotten of them is read again from the last one before it."""
    with session(lfm2) as chat:
        ask(chat, ASKED[:1])
        monkeypatch.setattr(archived_cells, "MOST_STATES", 3 * len(chat.cache.archive.marks[0].data))
        ask(chat, ASKED[1:])
        marked = chat.cache.marked
        assert 2 <= len(marked) <= 3 and sum(len(mark.data) for mark in chat.cache.archive.marks) <= archived_cells.MOST_STATES
        read, append = [], chat.cache.append
        monkeypatch.setattr(chat.cache, "append", lambda tokens, *args, **options: (read.append(len(tokens)), append(tokens, *args, **options))[1])
        messages = list(chat.messages)
        lengths = {mark.n_messages for mark in chat._marks}
        gone = next(n for n in range(2, 7) if len(messages) - 2 * n not in lengths)
        n_tokens = chat.cache.ledger.n_tokens
        chat.undo(gone)
        assert chat.messages == messages[: -2 * gone] and not chat.cache.uncertain and sum(read) < n_tokens
        assert ask(chat, MORE[:1])


def test_an_answer_that_is_cut_is_what_it_says(lfm2):
    """A token of an answer that is stopped leaves the cache, though nothing is cut off a recurrent state."""
    with session(lfm2) as chat:
        ask(chat, ASKED[:2])
        read_nothing_again(chat)
        answer = chat.send(ASKED[2])
        said = [next(answer) for _ in range(3)]
        chat.stop()
        said += list(answer)
        assert chat.messages[-1] == {"role": "assistant", "content": "".join(said)}
        assert ask(chat, MORE[:1])
        history = lfm2.detokenize(chat.cache.ledger.ids, special=True)
        assert not chat.cache.uncertain and f"{ASKED[2]}<|im_end|>\n<|im_start|>assistant\n{''.join(said)}<|im_end|>" in history


def test_what_is_held_comes_back(lfm2):
    with ChatSession(lfm2, CHAT, spare=300) as chat, ChatSession(lfm2, CHAT, spare=300) as other:
        for one in (chat, other):
            ask(one, ASKED[:3])
        with chat.hold():
            ask(chat, ["Well."])
            with chat.hold():
                ask(chat, ["No.", "Yes."])
        check_equal(chat, other)
        chat.undo(2)
        other.undo(2)
        assert ask(chat, MORE) == ask(other, MORE)


def test_what_is_read_a_second_time_leaves_nothing(lfm2):
    with session(lfm2, policy="kvzip-snapkv", archive="off", idle=True) as chat:
        ask(chat, ASKED[:2])
        chat.finish_turn()
        before = state(chat)
        assert isinstance(chat._second_read, SecondRead) and chat.second_read()
        assert not chat.cache.uncertain and np.isfinite(chat.cache.ledger.scores("reread")).any()
        for name, array in state(chat).items():
            np.testing.assert_array_equal(array, before[name], err_msg=name)
        assert ask(chat, MORE)


def test_past_the_trained_context(files, smollm2):
    """Keys and state move to lower positions, and the way back leads over that."""
    path = files / "short.gguf"
    if not path.exists():
        write_hybrid_model(smollm2, path, n_ctx_train=320)
    with Model(path) as model, session(model) as chat, session(model) as other:
        ask(chat, [*ASKED, *MORE])
        assert chat.kv.rotations > 0 and chat.kv.history_tokens > 600 and chat.kv.next_position < 320
        read_nothing_again(chat)
        chat.undo(4)
        ask(other, [*ASKED, *MORE][:-4])
        check_equal(chat, other)
        assert ask(chat, MORE) == ask(other, MORE)
        check_equal(chat, other)


def test_a_turn_that_fails_is_taken_back(lfm2, monkeypatch):
    """In the worst moment: the cells are exchanged, the ledger not yet."""
    with session(lfm2) as chat, session(lfm2) as other:
        for one in (chat, other):
            ask(one, ASKED[:4])
        read_nothing_again(chat)

        def interrupt(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(chat.cache.ledger, "refill", interrupt)
            with pytest.raises(KeyboardInterrupt):
                chat.add_turn("user", STORY * 5)
        check_equal(chat, other)
        assert ask(chat, MORE) == ask(other, MORE)


def test_the_end_of_a_question_is_evaluated_again(model, monkeypatch):
    """With what it recalled in the cells, from the state that was copied in front of it."""
    ran, run = [], SecondEvaluation.run

    def note(again, ledger, archive, n):
        before, at = ledger.n_tokens, again._before and again._before.n_tokens
        ran.append((run(again, ledger, archive, n), at is not None and before - at <= n))
        assert ledger.n_tokens == before
        return ran[-1][0]

    monkeypatch.setattr(SecondEvaluation, "run", note)
    with session(model) as chat:
        ask(chat, [ASKED[1], ASKED[0], ASKED[3]])
        assert len(ran) == 3 and all(done and fits for done, fits in ran)
        assert not chat.cache.uncertain and chat.cache.context.pos_min() == chat.cache.context.pos_max() == chat.kv.next_position - 1


# texts


def test_a_text_is_gone_on_with(lfm2):
    text = lfm2.tokenize(STORY * 8, parse_special=False)
    with TextSession(lfm2, CHAT) as one, TextSession(lfm2, CHAT) as other:
        assert one.read(text) == 0
        drawn = "".join(one.answer())
        n_marked = one.cache.marked[-1]
        # the same text again: from its mark, and to the same end
        assert one.read(text) == n_marked and "".join(one.answer()) == drawn
        # and another that has less in common
        assert one.read(text[:-3]) <= len(text) - 4
        other.read(text[:-3])
        assert not one.cache.uncertain and "".join(one.answer()) and "".join(other.answer())


# files


@pytest.mark.parametrize("changes", [{}, {"archive": "off", "policy": "kvzip-snapkv"}, {"archive": "off", "policy": "full", "budget": 900}])
def test_a_snapshot_has_the_state(model, tmp_path, changes):
    path = tmp_path / "chat.snapshot"
    with session(model, **changes) as chat, session(model, **changes) as resumed, session(model, **changes) as undone:
        ask(chat, ASKED[:4])
        chat.finish_turn()
        Snapshots(path).save(chat)
        for one in (resumed, undone):
            assert Snapshots(path).load(one, chat.messages) == len(chat.messages)
            read_nothing_again(one)
        check_equal(resumed, chat)
        undone.undo()
        chat.undo()
        check_equal(undone, chat)
        assert ask(undone, MORE) == ask(chat, MORE)
        assert ask(resumed, MORE)


@pytest.mark.parametrize("changes", [{}, {"archive": "off", "policy": "full", "budget": 900}])
def test_a_snapshot_with_another_state_is_refused(model, changes):
    with session(model, **changes) as chat, session(model, **changes) as other:
        ask(chat, ASKED[:2])
        arrays, archive = chat.snapshot(), chat.cache.archive
        parts = [part.data for part in archive.parts()] if archive else []
        state = chat.cache.context.recurrent_state()
        at = arrays["ring"].nbytes - len(state)
        count, position = at + 8, at + 12
        wrong = {
            "none": arrays["ring"][:at], "cut": arrays["ring"][:-5], "longer": np.concatenate([arrays["ring"], np.zeros(4, np.uint8)]),
            "two": _with(arrays["ring"], count, 2), "behind": _with(arrays["ring"], position, 10_000), "before": _with(arrays["ring"], position, 3),
        }  # fmt: skip
        for name, ring in wrong.items():
            with pytest.raises(Exception, match="snapshot|contradicts|fit|state|differ|cells"):
                other.resume(chat.messages, {**arrays, "ring": ring}, parts)
                pytest.fail(name)
            assert not other.messages
        other.resume(chat.messages, arrays, parts)
        check_equal(other, chat)


def _with(data, at, number):
    changed = data.copy()
    changed[at : at + 4] = np.array([number], "<u4").view(np.uint8)
    return changed


# side by side


def test_slots_decode_as_alone(model, tokens):
    """Next tokens of several sequences in one batch, beside texts that are read; rounded as alone or very nearly so."""

    def read(tokens, context):
        context.decode(tokens[:-6], 0)
        rows = [context.logits()]
        before = context.recurrent_state()
        for pos in range(len(tokens) - 6, len(tokens)):
            context.decode(tokens[pos : pos + 1], pos)
            rows.append(context.logits())
        end = context.recurrent_state()
        # and once more from the state that was copied
        context.set_recurrent_state(0, before)
        context.remove(0, len(tokens) - 6, -1)
        for pos in range(len(tokens) - 6, len(tokens)):
            context.decode(tokens[pos : pos + 1], pos)
            rows.append(context.logits())
        return np.stack(rows), end

    tasks = [partial(read, tokens[20 * i : 20 * i + 20 + 5 * i]) for i in range(3)]
    results = together(model, *tasks)
    for task, (rows, end) in zip(tasks, results, strict=True):
        with Context(model, **OPTIONS) as context:
            alone, state = task(context)
        np.testing.assert_allclose(rows, alone, atol=5e-3)
        np.testing.assert_allclose(rows[1:7], rows[7:], atol=5e-3)
        # behind magic number and sequence
        assert len(end) == len(state) and end[8:40].tolist() == state[8:40].tolist()


def test_a_batch_answers_as_alone(lfm2):
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}).encode() + b"\n" for text in (STORY * 6, "Why?", STORY * 4 + "Who?")]
    alone, beside = ({result.number: result.messages for result in run_batch(iter(lines), lfm2, CHAT, parallel=n)} for n in (1, 3))
    assert alone == beside and len(alone) == 3


def test_a_server_goes_on_goes_back_and_brings_back(lfm2):
    """Three conversations in two slots, one of which is edited in the middle."""

    def ask(engine, *messages):
        *_, last = engine.submit(AnswerRequest("me", messages)).events()
        return last

    def user(text):
        return {"role": "user", "content": text}

    with Engine(lfm2, CHAT, parallel=2, waiting=2) as engine, session(lfm2) as alone:
        histories = [[user(STORY * 3 + str(i))] for i in range(3)]
        for _ in range(2):
            for history in histories:
                found = ask(engine, *history)
                history += [found.message, user("And then?")]
        last = ask(engine, *histories[0])
        assert last.usage.cached_tokens > 0.8 * last.usage.prompt_tokens
        edited = ask(engine, *histories[0][:2], user("No: why?"))
        assert edited.usage.cached_tokens > 0.5 * edited.usage.prompt_tokens
        for history, answer in ((histories[0], last), ([*histories[0][:2], user("No: why?")], edited)):
            alone.clear()
            said = ask_again(alone, history)
            assert said == answer.message["content"]


def ask_again(chat, history):
    """The last answer of a conversation in which each answer is drawn, not read."""
    for message in history:
        if message["role"] == "user":
            said = "".join(chat.send(message["content"]))
    return said


def test_a_slice_that_was_timed_is_taken_back(lfm2):
    plain = PlainReader(lfm2, Script(lfm2, 8), {"n_ubatch": 64, "n_threads": 1, "n_cells": 256})
    plain.extend(120, 1000)
    before = plain._context.recurrent_state()
    assert plain.slice(8, 1) > 0 and plain._context.pos_max() == 119
    np.testing.assert_array_equal(plain._context.recurrent_state(), before)
    plain.close()


# what is told of a file


def test_a_file_tells_what_it_is(files, model):
    path = files / f"{model.metadata['general.architecture']}.gguf"
    facts, attention, recurrent = model_facts(path), Attention.of(Container(path)), Recurrent.of(Container(path))
    assert facts["compressible"] and facts["recalls"] and (facts["layers"], facts["recurrent_layers"]) == (6, 4)
    assert recurrent.attention_layers == {1, 4} and attention.n_head_kv_each == tuple(LAYERS)
    with session(model) as chat:
        context = chat.cache.context
        assert abs(context.kv_bytes() - context.n_cells * attention.cell_bytes("f16", "f16")) < 2**13
        # besides which layers and types they are of
        assert 0 <= len(context.recurrent_state()) - recurrent.state_bytes < 200
        assert chat.cache.kv_bytes >= context.kv_bytes() + context.state_bytes()
    shown = CliRunner().invoke(main, ["show", str(path)]).stdout
    assert "6, 4 of them recurrent, 4 heads, 2 KV heads of 32" in shown


def test_without_attention_there_is_nothing_to_compress(smollm2, tmp_path):
    write_hybrid_model(smollm2, tmp_path / "mamba2.gguf", "mamba2")
    with pytest.raises(EngineError, match="recurrent state of fixed size .* nothing to compress: choose"):
        Model(tmp_path / "mamba2.gguf")
    assert "no KV cache to compress" in model_facts(tmp_path / "mamba2.gguf")["why_not"]
