"""Latent attention: the cache has one head, whose values are the beginnings of its keys, and everything is done with that head."""

import dataclasses

import numpy as np
import pytest
from host_keys import row_scores
from latent_model import LATENT, N_HEAD, N_LAYER, PLAIN, ROTATED, write_latent_model
from recalling import CHAT, STORY, ask, session

from kvlocal.cache.config import CacheError
from kvlocal.cache.fitting import check_file
from kvlocal.conversations.snapshot import Snapshots
from kvlocal.doctor.model_facts import model_facts
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal.llama.placement import Placement

ASKED = ["Name a bird.", STORY * 6, "Why?", STORY * 3 + "What did the keeper write down?", "Name a tree."]
MORE = ["Go on.", STORY * 4 + "Who wrote?"]


@pytest.fixture(scope="module")
def file(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("latent") / "latent.gguf"
    write_latent_model(smollm2, path)
    return path


@pytest.fixture(scope="module")
def model(file):
    with Model(file) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tokens(model):
    """Random ones of its vocabulary, int32 [600]."""
    return np.random.default_rng(7).integers(100, model.n_vocab, 600).astype(np.int32)


def read(context, tokens):
    for start in range(0, len(tokens), context.n_ubatch):
        context.decode(tokens[start : start + context.n_ubatch], start)


def check_equal(one, other):
    """Messages and cells, bit for bit."""
    assert one.messages == other.messages and not one.cache.uncertain
    cells = [(chat.cache.native.read_rows(np.arange(chat.cache.ledger.n_cells)).k, chat.cache.native.positions()) for chat in (one, other)]
    for mine, theirs in zip(*cells, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("portable", [False, True])
def test_the_scores_are_those_of_the_one_head(model, tokens, portable):
    with Context(model, n_cells=256, n_ubatch=64, n_threads=1, n_recorded=16) as context:
        native = NativeCache(context.pointer)
        read(context, tokens[:200])
        layout = native.layout()
        assert (layout.n_layer, layout.n_head, layout.n_head_kv) == (N_LAYER, N_HEAD, 1)
        assert (layout.n_embd_head_k, layout.n_embd_head_v) == (LATENT + ROTATED, LATENT)
        assert layout.row_size_v == 0 and layout.can_rotate
        scores = native.scores(portable=portable)
        for layer in range(N_LAYER):
            keys, queries = native.read_keys(layer)[0], native.read_queries(layer)
            np.testing.assert_array_equal(native.read_values(layer)[0], keys[:, :LATENT])
            logits = np.einsum("qhd,kd->hqk", queries, keys) * native.kq_scale(layer)
            logits[:, np.arange(200) > native.query_positions()[:, None]] = -np.inf
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(scores[layer, 0], weights.max(axis=0).mean(axis=0), atol=1e-3)
        chunk = native.read_rows(np.arange(200))
        assert chunk.v.nbytes == 0
        np.testing.assert_allclose(row_scores(native, [chunk.k], 200), scores, atol=1e-3)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_what_is_kept_is_moved_bit_for_bit(model, tokens, kind, portable):
    with Context(model, n_cells=256, n_ubatch=64, n_threads=1, type_k=kind, type_v=kind, n_recorded=16) as context:
        native = NativeCache(context.pointer)
        read(context, tokens[:128])
        before, keep = native.read_rows(np.arange(128)).k, np.sort(np.random.default_rng(1).permutation(128)[:60])
        native.compact(np.broadcast_to(keep, (N_LAYER, 1, 60)), np.arange(68, 128), portable=portable)
        np.testing.assert_array_equal(native.read_rows(np.arange(60)).k, before[:, :, keep])
        context.decode(tokens[128:140], 128)
        assert np.isfinite(context.logits()).all()


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize(("kind", "atol"), [("f32", 1e-4), ("f16", 5e-3), ("q8_0", 0.1)])
def test_the_last_numbers_of_a_key_are_rotated(smollm2, tmp_path, tokens, kind, atol, absorbed):
    """A text that is moved to lower positions is what it is when it is read there: attention knows distances alone. So it is with older files, whose
    cache has keys and values of all heads."""
    write_latent_model(smollm2, tmp_path / "model.gguf", absorbed=absorbed)
    options = {"n_cells": 256, "n_ubatch": 64, "n_threads": 1, "type_k": kind, "type_v": kind, "n_recorded": 16}
    with Model(tmp_path / "model.gguf") as model, Context(model, **options) as context, Context(model, **options) as other:
        native = NativeCache(context.pointer)
        for start in range(0, 100, 50):
            context.decode(tokens[start : start + 50], 300 + start)
        other.decode(tokens[:50], 0)
        other.decode(tokens[50:100], 50)
        shape = (N_LAYER, native.layout().n_head_kv, 100)
        native.compact(np.broadcast_to(np.arange(100), shape), np.arange(100), np.full(shape, -300))
        keys = [[cache.read_keys(layer) for layer in range(N_LAYER)] for cache in (native, NativeCache(other.pointer))]
        # those of deeper layers come of attention at other positions, which is computed in half precision
        np.testing.assert_allclose(keys[0][0], keys[1][0], atol=atol)
        for mine, theirs in zip(*keys, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=max(0.05, 5 * atol))
        for one in (context, other):
            one.decode(tokens[100:101], 100)
        np.testing.assert_allclose(context.logits(), other.logits(), atol=max(0.05, 5 * atol))


@pytest.mark.parametrize(("depth", "kind"), [(1, "f16"), (3, "q8_0"), (5, "f16")])
def test_answers_are_those_of_a_conversation_that_never_had_the_turns(model, depth, kind):
    with session(model, type_k=kind, type_v=kind) as chat, session(model, type_k=kind, type_v=kind) as other:
        ask(chat, ASKED)
        assert chat.kv.compressions > 4 and chat.kv.archived == chat.kv.history_tokens and chat.kv.recalled > 0
        chat._begin = chat.restore = None
        chat.undo(depth)
        ask(other, ASKED[:-depth])
        check_equal(chat, other)
        assert ask(chat, MORE) == ask(other, MORE)


@pytest.mark.parametrize("policy", ["kvzip-snapkv", "streaming", "rkv"])
def test_without_an_archive(model, policy):
    args = {"values": "on"} if policy == "kvzip-snapkv" else {}
    changes = {"policy": policy, "archive": "off", "policy_args": args}
    with session(model, **changes) as chat, session(model, **changes) as other:
        ask(chat, ASKED[:3])
        chat.undo()
        ask(other, ASKED[:2])
        check_equal(chat, other)
        assert ask(chat, MORE) == ask(other, MORE) and chat.kv.compressions > 1


def test_past_the_trained_context(smollm2, tmp_path):
    write_latent_model(smollm2, tmp_path / "short.gguf", n_ctx_train=320)
    with Model(tmp_path / "short.gguf") as model, session(model) as chat, session(model) as other:
        ask(chat, [*ASKED, *MORE])
        assert chat.kv.rotations > 0 and chat.kv.next_position < 320
        chat._begin = chat.restore = None
        chat.undo(3)
        ask(other, [*ASKED, *MORE][:-3])
        check_equal(chat, other)
        assert ask(chat, MORE) == ask(other, MORE)


def test_a_snapshot_comes_back(model, tmp_path):
    with session(model) as chat, session(model) as resumed:
        ask(chat, ASKED[:3])
        Snapshots(tmp_path / "chat.snapshot").save(chat)
        assert Snapshots(tmp_path / "chat.snapshot").load(resumed, chat.messages) == len(chat.messages)
        check_equal(resumed, chat)
        assert ask(resumed, MORE) == ask(chat, MORE)


def test_keys_and_values_have_one_type(file):
    with pytest.raises(CacheError, match="parts of its keys .*: give --ctk q8_0 --ctv q8_0"):
        check_file(file, dataclasses.replace(CHAT, type_k="q8_0"), Placement())
    assert check_file(file, dataclasses.replace(CHAT, type_k="q8_0", type_v="q8_0"), Placement())


def test_a_file_tells_what_it_is(file, model):
    facts, attention = model_facts(file), Attention.of(Container(file))
    assert facts["compressible"] and facts["recalls"] and facts["kv_heads"] == 1 and facts["head_size"] == LATENT + ROTATED != PLAIN + ROTATED
    with Context(model, n_cells=1024, n_ubatch=64) as context:
        assert abs(context.kv_bytes() - 1024 * attention.cell_bytes("f16", "f16")) < 2**13
