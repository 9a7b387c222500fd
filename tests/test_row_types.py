"""Rows of other types than the cache's: converted as ggml does when they are written and brought back, scored as they are."""

import gguf
import numpy as np
import pytest
import tiny_model
from gguf import GGMLQuantizationType
from host_keys import best_rows, row_scores
from test_native import Chat, L, W, hadamard_matrix, reference_scores, rotate
from test_rows import STEP, assert_same, boxed, chunks_of, everything, mixed, numbers, pick, supported

from kvlocal.llama.c_arrays import ints
from kvlocal.llama.cache_types import row_types
from kvlocal.llama.context import KV_TYPES
from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.llama.rows import Rows

pytestmark = pytest.mark.device

CACHES = [("f16", "q4_0"), ("q8_0", "f32")]


@pytest.fixture(scope="module")
def model(shallow_model):
    return shallow_model


@pytest.fixture(scope="module", params=CACHES, ids="-".join)
def cache(request, model):
    if not supported(model, *request.param):
        pytest.skip("this device has no attention for these types")
    return dict(zip(("type_k", "type_v"), request.param, strict=True)) | {"n_threads": 1}


@pytest.fixture(params=KV_TYPES)
def kind(request):
    return request.param


def stored(values, kind):
    """Numbers [.., head size] as rows [.., bytes], by gguf's own writing of the types; it has none for iq4_nl."""
    if kind in ("f16", "f32"):
        return np.ascontiguousarray(values.astype({"f16": np.float16, "f32": np.float32}[kind])).view(np.uint8)
    return gguf.quantize(np.ascontiguousarray(values, np.float32), GGMLQuantizationType[kind.upper()])


def check_iq4_nl(found, values, exact):
    """Blocks, float [n, 32] each: every number has the nearest code, where the largest of a block is to have the lowest one; then the scale is that
    which makes the squares of the errors least, each weighed by the square of its number.

    exact: whether hardly any number can be as near to one code as to another
    """
    largest = np.take_along_axis(values, np.abs(values).argmax(-1)[:, None], axis=-1)
    assert (np.abs(found - values) <= STEP["iq4_nl"] * np.abs(largest)).all()
    codes = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float64)
    chosen = codes[np.abs(values[..., None] / (largest / codes[0])[..., None] - codes).argmin(-1)]
    scales = (values**3 * chosen).sum(-1) / (values**2 * chosen**2).sum(-1)
    assert not exact or (np.abs(found - scales[:, None] * chosen) < 1e-3 * np.abs(largest)).mean() > 0.999


def in_type(chat, kind, n=None):
    """All cells, or the first n, as rows of a type."""
    return chat.native.read_rows(np.arange(n or chat.native.n_cells()), row_types(kind, chat.native.layout()))


def test_rows_are_written_as_ggml_rounds_them(model, tokens, cache, kind):
    chat = Chat(model, tokens, n=100, **cache)
    own, rows = everything(chat.native), in_type(chat, kind)
    for found, array, of_cache in ((rows.k, own.k, cache["type_k"]), (rows.v, own.v, cache["type_v"])):
        values = numbers(array, of_cache)
        if kind == of_cache:
            np.testing.assert_array_equal(found, array)
        elif kind == "iq4_nl":
            check_iq4_nl(numbers(found, kind).reshape(-1, 32), values.reshape(-1, 32), exact=of_cache in ("f16", "f32"))
        else:
            np.testing.assert_array_equal(found, stored(values, kind))
    cells = np.array([70, 3, 4, 99, 3])
    assert_same(chat.native.read_rows(cells, rows.types), pick(rows, np.broadcast_to(cells, (L, 3, 5))))


@pytest.mark.parametrize("portable", [False, True])
def test_rows_come_back_as_the_cache_rounds_them(model, tokens, cache, kind, portable):
    """Those alone: cells that stay are not touched, though they move."""
    chat, other = Chat(model, tokens, n=150, **cache), Chat(model, tokens[500:], n=48, **cache)
    before, brought = everything(chat.native), in_type(other, kind)
    gather = mixed(chat, 110, brought.n, ascending=not portable)
    chunks = [Rows(*(array[:, :, at : at + 16] for array in (brought.k, brought.v)), brought.types) for at in (0, 16, 32)]
    chat.native.compact(gather, np.arange(110), rows=chunks, portable=portable)
    after, host = everything(chat.native), gather >= 150
    of_cells, of_host = pick(before, np.where(host, 0, gather)), pick(brought, np.where(host, gather - 150, 0))
    assert host.any() and not host.all()
    for found, kept, rows, of_cache in (
        (after.k, of_cells.k, of_host.k, cache["type_k"]), (after.v, of_cells.v, of_host.v, cache["type_v"])
    ):  # fmt: skip
        np.testing.assert_array_equal(found[~host], kept[~host])
        np.testing.assert_array_equal(found[host], rows[host] if kind == of_cache else stored(numbers(rows[host], kind), of_cache))


@pytest.mark.parametrize("portable", [False, True])
def test_rows_come_back_rotated(model, tokens, cache, kind, portable):
    chat, other = Chat(model, tokens, n=150, **cache), Chat(model, tokens[500:], n=40, **cache)
    before, brought, of_cache = everything(chat.native), in_type(other, kind), cache["type_k"]
    gather = mixed(chat, 110, brought.n)
    gather[..., -W:] = np.arange(150 - W, 150)
    host = gather >= 150
    delta = np.where(host, np.random.default_rng(1).integers(-30, 1000, gather.shape), 0)
    chat.native.compact(gather, np.r_[np.arange(110 - W) + 3, np.arange(150 - W, 150)], delta, rows=brought, portable=portable)
    after = everything(chat.native)
    np.testing.assert_array_equal(after.k[~host], pick(before, np.where(host, 0, gather)).k[~host])
    hadamard = np.eye(64) if of_cache in ("f16", "f32") else hadamard_matrix(64)
    keys = numbers(pick(brought, np.where(host, gather - 150, 0)).k[host], kind) @ hadamard
    wanted = rotate(keys, delta[host].astype(np.float64), 100000.0, 64) @ hadamard
    # a quantised cache rounds once when a row comes in and once when it was rotated
    off = np.abs(numbers(after.k[host], of_cache) - wanted).max(-1) / np.abs(wanted).max(-1)
    assert off.max() < 2 * STEP[of_cache]
    np.testing.assert_array_equal(chat.native.query_positions(), np.arange(150 - W, 150))


@pytest.mark.parametrize("moved", [([0], [0]), ([0, 1, 37, 100, 170], [5000, -3, 0, -30, 0])], ids=["stay", "stretches"])
def test_scores_are_those_of_the_rounded_keys(model, tokens, cache, kind, moved):
    chat = Chat(model, tokens, n=200, **cache)
    rows = in_type(chat, kind)
    shifts = np.repeat(moved[1], np.diff([*moved[0], 200])).astype(np.float64)
    hadamard = np.eye(64) if cache["type_k"] in ("f16", "f32") else hadamard_matrix(64)
    for options in ({"n_query": W}, {"n_query": 5, "largest": True}):
        scores = row_scores(chat.native, chunks_of(rows.k, 64), 200, stretches=moved, types=rows.types, **options)
        for layer in (0, L - 1):
            rotated = rotate(numbers(rows.k[layer], kind) @ hadamard, np.broadcast_to(shifts, (3, 200)), 100000.0, 64) @ hadamard
            np.testing.assert_allclose(scores[layer], reference_scores(chat, layer, keys=rotated, **options), atol=1e-3)


def test_boxes_and_the_best_rows_are_those_of_the_rounded_keys(model, tokens, cache, kind):
    """Of float32 numbers, which are what rows of the type say, they are the same."""
    chat = Chat(model, tokens, n=360, **cache)
    rows = in_type(chat, kind)
    plain = Rows(stored(numbers(rows.k, kind), "f32"), rows.v, row_types("f32", chat.native.layout()))
    (chunks, boxes), (expected_chunks, expected_boxes) = (boxed(chat, array.k, array.types) for array in (rows, plain))
    for box, expected in zip(boxes, expected_boxes, strict=True):
        np.testing.assert_array_equal(box, expected)
    options = {"first": 16, "last": 320, "n_blocks": 6, "n_query": W, "stretches": ([0, 20, 330], [500, -3, 0])}
    found, scores = best_rows(chat.native, chunks, boxes, 360, types=rows.types, **options)
    expected, expected_scores = best_rows(chat.native, expected_chunks, expected_boxes, 360, types=plain.types, **options)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


def test_types_that_rows_cannot_have_are_refused_and_change_nothing(model, tokens):
    chat = Chat(model, tokens, n=60, n_cells=256)
    native, lib, ffi = chat.native, load().lib, load().ffi
    before, context = everything(native), native._context
    cells, gather = ints(np.arange(60, dtype=np.int32)), ints(np.ascontiguousarray(chat.everywhere(np.arange(60)), np.int32))
    chunk = np.zeros((L, 3, 256, 128), np.uint8)
    keys, box = ffi.from_buffer("uint8_t[]", chunk), ffi.new("uint16_t[]", L * 3 * 2 * 64 * 16)
    pointers, boxes = ffi.new("uint8_t *[]", [ffi.cast("uint8_t *", chunk.ctypes.data)]), ffi.new("uint16_t *[]", [box])
    scores, found = ffi.new("float[]", L * 3 * 60), ffi.new("int32_t[]", L * 3 * 60)
    queries = native.copy_queries()._handle
    # one that is no more, one of 256 numbers, one of whole numbers, and none at all
    lcpp = load().llama_cpp
    for wrong in (-1, 4, lcpp.GGML_TYPE_Q4_K, lcpp.GGML_TYPE_I8, 1000, 2**31 - 1):
        for name in ("type_k", "type_v"):
            rows, *_pointers = native._rows([before])
            setattr(rows, name, wrong)
            assert lib.kvl_read_rows(context, 0, cells, rows, L, 3, 60) == lib.KVL_ERR_ARGUMENT
            assert lib.kvl_compact(context, 0, gather, cells, ffi.NULL, rows, 0, L, 3, 60, 60) == lib.KVL_ERR_ARGUMENT
        null = ffi.NULL
        assert lib.kvl_get_row_scores(queries, 0, pointers, wrong, 1, 256, null, null, 0, scores, L, 3, 60) == lib.KVL_ERR_ARGUMENT
        assert lib.kvl_get_boxes(context, keys, wrong, 256, 0, 1, box, ffi.sizeof(box), L, 3) == lib.KVL_ERR_ARGUMENT
        best = lib.kvl_get_best_rows(queries, 2, pointers, wrong, boxes, 1, 256, 60, null, null, 0, 0, 32, found, scores, L, 3, 60)
        assert best == lib.KVL_ERR_ARGUMENT and b"type" in ffi.string(lib.kvl_last_error())
    # a type whose rows have other sizes
    rows, *_pointers = native._rows([before])
    rows.type_k = lcpp.GGML_TYPE_Q8_0
    assert lib.kvl_read_rows(context, 0, cells, rows, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert_same(everything(native), before)
    small = in_type(chat, "q4_0")
    with pytest.raises(ValueError, match="several types"):
        native.compact(chat.everywhere(np.arange(60)), np.arange(60), rows=[small, Rows(small.k, small.v, row_types("iq4_nl", native.layout()))])
    with pytest.raises(ValueError, match="rows of this cache must be"):
        native.compact(chat.everywhere(np.arange(60)), np.arange(60), rows=Rows(small.k, small.v))
    with pytest.raises(ValueError, match="keys must be contiguous"):
        row_scores(native, chunks_of(small.k, 64), 60)


def test_heads_that_are_no_whole_blocks_are_refused(tmp_path):
    tiny_model.write_tiny_model(tmp_path / "tiny.gguf", "llama", n_layer=2)
    with Model(tmp_path / "tiny.gguf") as model:
        chat = Chat(model, np.random.default_rng(0).integers(0, model.n_vocab, 80).astype(np.int32), n=40, n_cells=256, n_threads=1)
        layout, lib = chat.native.layout(), load().lib
        with pytest.raises(ValueError, match=f"{tiny_model.HEAD} numbers are no whole blocks of q8_0"):
            row_types("q8_0", layout)
        for name in ("type_k", "type_v"):
            rows, *_pointers = chat.native._rows([everything(chat.native)])
            setattr(rows, name, load().llama_cpp.GGML_TYPE_Q8_0)
            cells = ints(np.arange(40, dtype=np.int32))
            assert lib.kvl_read_rows(chat.native._context, 0, cells, rows, layout.n_layer, layout.n_head_kv, 40) == lib.KVL_ERR_ARGUMENT
            assert b"whole blocks" in load().ffi.string(lib.kvl_last_error())
        wide = in_type(chat, "f32")
        chat.native.compact(chat.everywhere(np.arange(40) + 40), np.arange(40), rows=wide)
        np.testing.assert_array_equal(everything(chat.native).k, stored(numbers(wide.k, "f32"), "f16"))


@pytest.mark.parametrize("portable", [False, True])
def test_heads_whose_rows_are_no_whole_words(tmp_path, monkeypatch, portable):
    """A head of 32 numbers takes 34 bytes in q8_0, which a device moves by way of the host."""
    monkeypatch.setattr(tiny_model, "HEAD", 32)
    tiny_model.write_tiny_model(tmp_path / "tiny.gguf", "llama", n_layer=2)
    with Model(tmp_path / "tiny.gguf") as model:
        if not supported(model, "q8_0", "q5_0"):
            pytest.skip("this device has no attention for heads of this size")
        text = np.random.default_rng(0).integers(0, model.n_vocab, 200).astype(np.int32)
        chat = Chat(model, text, n=80, n_cells=256, n_threads=1, type_k="q8_0", type_v="q5_0")
        before, rows = everything(chat.native), in_type(chat, "f16")
        gather = np.r_[90:110, 20:40, 60:80]
        chat.native.compact(chat.everywhere(gather), np.r_[:40, 60:80], rows=rows, portable=portable)
        after = everything(chat.native)
        np.testing.assert_array_equal(after.k[:, :, 20:], before.k[:, :, gather[20:]])
        np.testing.assert_array_equal(after.k[:, :, :20], stored(numbers(rows.k[:, :, 10:30], "f16"), "q8_0"))
        np.testing.assert_array_equal(after.v[:, :, :20], stored(numbers(rows.v[:, :, 10:30], "f16"), "q5_0"))
