"""Wherever the layers and their cells are, all on a device, some of them or only the weights, the same comes of what is done with them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import device
import numpy as np
import pytest
import tiny_model
from recalling import CONFIG
from test_native import Chat, L, N, W, hadamard_matrix, log_softmax, reference_redundancy, reference_scores, reference_weights, rotate
from test_recall import check
from test_rows import STEP, assert_same, everything, joined, numbers, pick

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement
from kvlocal.llama.sampling import SamplingParams

pytestmark = pytest.mark.device

# how many of the model's four layers and its output are on the device, and whether their cells are there too
PLACES = {"whole": (ALL, True), "part": (3, True), "whole-cells-on-cpu": (ALL, False), "part-cells-on-cpu": (3, False)}
ON_CPU = Placement(0)
# as far as the roundings of two devices, of float32 and in half precision, move a probability
CLOSE = 0.02


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> Placement:
    """Without a device there is one place; the tests must be able to run everywhere, or nobody notices when they cannot."""
    if device.on_cpu():
        if request.param != "whole":
            pytest.skip("there is no device")
        return ON_CPU
    n_gpu_layers, kv_offload = PLACES[request.param]
    usual = Model.__init__.__kwdefaults__["placement"] or Placement()
    return dataclasses.replace(usual, n_gpu_layers=n_gpu_layers, kv_offload=kv_offload)


@pytest.fixture(scope="module")
def model(place: Placement, shallow_file: Path) -> Iterator[Model]:
    with Model(shallow_file, placement=place) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def on_cpu(shallow_file: Path) -> Iterator[Model]:
    with Model(shallow_file, placement=ON_CPU) as loaded:
        yield loaded


@pytest.fixture(params=["f16", "q8_0"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def chat(model: Model, tokens: np.ndarray, kind: str) -> Chat:
    # repeated text, so that there are twins
    text = np.concatenate([tokens[:90], tokens[:90], tokens[200:]])
    return Chat(model, text, type_k=kind, type_v=kind, n_threads=1)


def test_the_layers_are_read_as_on_the_cpu(chat: Chat, on_cpu: Model, kind: str) -> None:
    other = Chat(on_cpu, chat.tokens, type_k=kind, type_v=kind, n_threads=1)
    for n in (40, 1, 1):
        found, expected = (log_softmax(each.feed(n)) for each in (chat, other))
        np.testing.assert_allclose(np.exp(found), np.exp(expected), rtol=0, atol=CLOSE)
    for layer in range(L):
        np.testing.assert_allclose(chat.native.read_queries(layer), other.native.read_queries(layer), rtol=0, atol=0.1)


def test_scores_map_and_redundancy(chat: Chat) -> None:
    chat.native.remove(np.array([7, 100, 200]))
    used = np.flatnonzero(chat.native.positions() >= 0)
    for options in ({"n_query": W}, {"n_query": 5}, {"n_query": 5, "largest": True}):
        scores = chat.native.scores(**options)
        assert not scores[..., [7, 100, 200]].any()
        for layer in range(L):
            np.testing.assert_allclose(scores[layer], reference_scores(chat, layer, **options), atol=1e-3)
    for row, layer in zip(chat.native.attention_map([0, L - 1], n_query=W), (0, L - 1), strict=True):
        np.testing.assert_allclose(row, reference_weights(chat, layer, W).mean(1), atol=1e-3)
    redundancy = chat.native.redundancy()
    for layer in (0, L - 1):
        for head, keys in enumerate(chat.native.read_keys(layer).astype(np.float64)):
            expected, margin = reference_redundancy(keys, used)
            # a similarity that a device's rounding may bring to the other side of the threshold moves one entry of a mean
            np.testing.assert_allclose(redundancy[layer, head] / expected.max(), expected / expected.max(), atol=1e-3 if margin > 1e-3 else 5e-3)


def test_cells_that_leave_come_back_as_if_they_had_never_left(chat: Chat) -> None:
    archive, keep = everything(chat.native), chat.random_keep(120)
    state, ring = chat.context.state_get(0), chat.native.ring_state()
    expected = chat.feed(1)
    chat.context.clear()
    chat.context.state_set(0, state)
    chat.native.set_ring_state(ring)
    np.testing.assert_array_equal(chat.native.query_positions(), np.arange(N - W, N))
    chat.native.compact(keep, np.r_[np.arange(104), np.arange(N - W, N)])
    assert_same(everything(chat.native), pick(archive, keep))
    back = np.broadcast_to(np.arange(N) + 120, (L, 3, N)).copy()
    np.put_along_axis(back, keep, np.arange(120), axis=-1)
    chat.native.compact(back, np.arange(N), rows=archive)
    assert_same(everything(chat.native), archive)
    np.testing.assert_array_equal(chat.native.ring_state(), ring)
    chat.n_past = N
    np.testing.assert_array_equal(chat.feed(1), expected)


def test_rows_come_in_at_other_positions(chat: Chat, kind: str) -> None:
    before = everything(chat.native)
    gather = chat.random_keep(100).astype(np.int32)
    gather[..., 10:30] += N  # from the host, where the same rows are
    delta = np.where(gather >= N, 300, 0)
    delta[..., 0] = 17  # and a cell of the cache
    chat.native.compact(gather, np.r_[np.arange(84), np.arange(N - W, N)], delta, rows=before)
    after, expected = everything(chat.native), pick(joined(before, before), gather)
    np.testing.assert_array_equal(after.v, expected.v)
    np.testing.assert_array_equal(after.k[delta == 0], expected.k[delta == 0])
    hadamard = np.eye(64) if kind == "f16" else hadamard_matrix(64)
    wanted = rotate(numbers(expected.k, kind)[delta != 0] @ hadamard, delta[delta != 0].astype(np.float64), 100000.0, 64) @ hadamard
    off = np.abs(numbers(after.k, kind)[delta != 0] - wanted).max(-1) / np.abs(wanted).max(-1)
    assert off.max() < STEP[kind]
    np.testing.assert_array_equal(chat.native.query_positions(), np.arange(N - W, N))
    chat.native.compact(chat.everywhere(np.arange(100)), np.arange(100), chat.everywhere(np.arange(100) // 99), rows=None)
    assert len(chat.native.query_positions()) == 0
    chat.n_past, chat.tokens = 100, np.roll(chat.tokens, 100)
    assert np.isfinite(chat.feed(3, 1)).all()


def test_a_sliding_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Placement, kind: str) -> None:
    """Two of twelve layers have none, and are compressed."""
    monkeypatch.setattr(tiny_model, "HEAD", 64)
    tiny_model.write_tiny_model(tmp_path / "tiny.gguf", "gemma3", n_layer=12)
    text = np.random.default_rng(0).integers(0, 256, 400).astype(np.int32)
    logits = []
    for where in (place, ON_CPU):
        with Model(tmp_path / "tiny.gguf", placement=where) as model:
            chat = Chat(model, text, n=200, type_k=kind, type_v=kind, n_threads=1)
            layout = chat.native.layout()
            assert layout.is_swa and layout.n_layer == 2
            scores = chat.native.scores()
            for layer in range(2):
                np.testing.assert_allclose(scores[layer], reference_scores(chat, layer, W), atol=1e-3)
            keep = np.r_[0:60, 200 - W : 200]
            chat.native.compact(chat.everywhere(keep), keep - 30 * (keep >= 60), chat.everywhere(-30 * (keep >= 60)))
            chat.native.shift_beside(-30)
            chat.n_past -= 30
            logits.append(np.stack([log_softmax(chat.feed(1)) for _ in range(3)]))
    np.testing.assert_allclose(*np.exp(logits), rtol=0, atol=CLOSE)


def test_a_chat_that_is_compressed_and_recalls(place: Placement, three_layers: Path) -> None:
    config = SessionConfig(**vars(CONFIG) | {"sampling": SamplingParams(temperature=0), "max_tokens": 16})
    with Model(three_layers, placement=place) as model, ChatSession(model, config) as session:
        for i in range(4):
            text = "".join(session.send(f"Question {i}: name some things that start with the letter {chr(97 + i)}, and say what they are good for."))
            assert session.kv.used <= config.budget + config.stride
        assert session.kv.archived and session.kv.recalled
        check(session.cache, session.cache.compressor.recaller.archive)
        assert "".join(session.regenerate()) == text
        session.undo()
        check(session.cache, session.cache.compressor.recaller.archive)
