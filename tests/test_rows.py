"""Rows of the cache as bytes: read, moved, brought along and rotated, for every type of keys and values."""

import itertools

import device
import gguf
import numpy as np
import pytest
import tiny_model
from gguf import GGMLQuantizationType
from host_keys import best_rows, row_scores
from test_native import Chat, L, W, hadamard_matrix, reference_redundancy, reference_scores, rotate

from kvlocal.doctor.diagnosis import diagnose
from kvlocal.llama.c_arrays import floats, ints
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import KV_TYPES, Context
from kvlocal.llama.errors import NativeError
from kvlocal.llama.layout import BLOCK
from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.llama.rows import Rows

pytestmark = pytest.mark.device

# every type, for keys and for values, and never the same for both but once
PAIRS = [
    ("f16", "f16"), ("f32", "q8_0"), ("q8_0", "q4_0"), ("q5_1", "f16"), ("q5_0", "iq4_nl"), ("q4_1", "q5_1"), ("q4_0", "q5_0"), ("iq4_nl", "q4_1"),
    ("f16", "f32"),
]  # fmt: skip
# half a step of the type, as a share of the largest number of a block
STEP = {"f32": 1e-3, "f16": 1e-3, "q8_0": 1e-2, "q5_1": 0.04, "q5_0": 0.07, "q4_1": 0.08, "q4_0": 0.14, "iq4_nl": 0.14}


@pytest.fixture(scope="module")
def model(shallow_model):
    return shallow_model


def supported(model, type_k, type_v):
    """Whether the device that the tests run on takes these types; what it does not take is refused, and that is another test's."""
    with Context(model, n_cells=256, n_ubatch=32, type_k=type_k, type_v=type_v) as context:
        try:
            NativeCache(context.pointer).layout()
        except NativeError as error:
            assert error.code == load().lib.KVL_ERR_UNSUPPORTED
            return False
    return True


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def types(request, model):
    if not supported(model, *request.param):
        pytest.skip("this device has no attention for these types")
    # one thread: two that wait for each other crawl when the machine is busy
    return dict(zip(("type_k", "type_v"), request.param, strict=True)) | {"n_threads": 1}


def numbers(rows, kind):
    """Rows [.., bytes] as float32 [.., head size], by gguf's own reading of the types."""
    if kind in ("f16", "f32"):
        return rows.view({"f16": np.float16, "f32": np.float32}[kind]).astype(np.float32)
    return gguf.dequantize(rows, GGMLQuantizationType[kind.upper()])


def everything(native):
    return native.read_rows(np.arange(native.n_cells()))


def pick(rows, gather):
    """Row gather[l, h, j] of each layer and head."""
    return Rows(*(np.take_along_axis(array, gather[..., None], axis=2) for array in (rows.k, rows.v)))


def joined(a, b):
    return Rows(np.concatenate([a.k, b.k], axis=2), np.concatenate([a.v, b.v], axis=2))


def assert_same(a, b):
    np.testing.assert_array_equal(a.k, b.k)
    np.testing.assert_array_equal(a.v, b.v)


def mixed(chat, n_keep, n_rows, seed=0, ascending=True):
    """Cells and rows of the host in any share and place, different for each head, [L, H, n_keep]; the cells among them ascend if asked for."""
    layout, n = chat.native.layout(), chat.native.n_cells()
    rng = np.random.default_rng(seed)
    out = np.empty((layout.n_layer, layout.n_head_kv, n_keep), np.int32)
    for i, head in enumerate(out.reshape(-1, n_keep)):
        n_host = min(i * 7, n_keep - 1) if i % 4 else 0
        host = rng.random(n_keep).argsort()[:n_host]
        cells = rng.choice(n, n_keep - n_host, replace=not ascending)
        head[:] = -1
        head[host] = n + rng.integers(0, n_rows, n_host)
        head[head < 0] = np.sort(cells) if ascending else cells
    return out


def way_back(chat):
    """What brings a chat back to where it is now, to try something else on it."""
    state, ring, n_past = chat.context.state_get(0), chat.native.ring_state(), chat.n_past

    def go_back():
        chat.context.clear()
        chat.context.state_set(0, state)
        chat.native.set_ring_state(ring)
        chat.n_past = n_past

    return go_back


def test_rows_are_what_is_stored(model, tokens, types):
    chat = Chat(model, tokens, n=100, **types)
    layout = chat.native.layout()
    rows = everything(chat.native)
    assert rows.k.shape == (L, 3, 100, layout.row_size_k) and rows.v.shape == (L, 3, 100, layout.row_size_v) and rows.n == 100
    for layer in (0, L - 1):
        np.testing.assert_array_equal(numbers(rows.k[layer], types["type_k"]), chat.native.read_keys(layer))
        np.testing.assert_array_equal(numbers(rows.v[layer], types["type_v"]), chat.native.read_values(layer))
    cells = np.array([70, 3, 4, 99, 3])
    assert_same(chat.native.read_rows(cells), pick(rows, np.broadcast_to(cells, (L, 3, 5))))
    assert chat.native.read_rows(cells[:0]).n == 0


def test_what_is_not_rotated_is_moved_bit_by_bit(model, tokens, types):
    chat, other = Chat(model, tokens, n=150, **types), Chat(model, tokens[500:], n=40, **types)
    before, brought, go_back = everything(chat.native), everything(other.native), way_back(chat)
    for portable, ascending in itertools.product((False, True), repeat=2):
        go_back()
        gather = mixed(chat, 110, brought.n, ascending=ascending)
        chat.native.compact(gather, np.arange(110) + 40, rows=brought, portable=portable)
        assert chat.native.n_cells() == 110
        assert_same(everything(chat.native), pick(joined(before, brought), gather))
        np.testing.assert_array_equal(chat.native.positions(), np.arange(110) + 40)


@pytest.mark.parametrize("portable", [False, True])
def test_rows_in_chunks_are_the_same_rows(model, tokens, types, portable):
    chat, other = Chat(model, tokens, n=150, **types), Chat(model, tokens[500:], n=48, **types)
    before, brought = everything(chat.native), everything(other.native)
    gather = mixed(chat, 110, brought.n)
    chunks = [Rows(*(array[:, :, at : at + 16] for array in (brought.k, brought.v))) for at in (0, 16, 32)]
    chat.native.compact(gather, np.arange(110), rows=chunks, portable=portable)
    assert_same(everything(chat.native), pick(joined(before, brought), gather))


@pytest.mark.parametrize("portable", [False, True])
def test_identity_and_no_rows(model, tokens, portable):
    chat = Chat(model, tokens, n=60, n_threads=1)
    before = everything(chat.native)
    chat.native.compact(chat.everywhere(np.arange(60)), np.arange(60), portable=portable)
    chat.native.compact(chat.everywhere(np.arange(60)), np.arange(60), rows=Rows(before.k[:, :, :0], before.v[:, :, :0]), portable=portable)
    chat.native.compact(chat.everywhere(np.arange(60)), np.arange(60), delta=np.zeros((L, 3, 60)), portable=portable)
    assert_same(everything(chat.native), before)


def test_recalled_cells_are_as_if_they_had_never_left(model, tokens, types):
    """Evicted by head, then recalled into their old order: the next logits are those of the cache that kept everything. And an empty cache is filled
    from rows."""
    n = 180
    chat = Chat(model, tokens, n=n, **types)
    archive, keep, go_back = everything(chat.native), chat.random_keep(100), way_back(chat)
    expected = chat.feed(2, 1)
    for portable in (False, True):
        go_back()
        chat.native.compact(keep, np.r_[np.arange(84), np.arange(n - W, n)], portable=portable)
        back = np.broadcast_to(np.arange(n) + 100, (L, 3, n)).copy()
        np.put_along_axis(back, keep, np.arange(100), axis=-1)
        chat.native.compact(back, np.arange(n), rows=archive, portable=portable)
        assert_same(everything(chat.native), archive)
        np.testing.assert_array_equal(chat.native.query_positions(), np.arange(n - W, n))
        np.testing.assert_array_equal(chat.feed(2, 1), expected)
        chat.context.clear()
        chat.n_past = n
        chat.native.compact(chat.everywhere(np.arange(n)), np.arange(n), rows=archive, portable=portable)
        np.testing.assert_array_equal(chat.feed(2, 1), expected)


@pytest.mark.parametrize("portable", [False, True])
def test_rotation_touches_what_it_rotates_alone(model, tokens, types, portable):
    """Cells stay, rows of the host come in at other positions: those alone are decoded, rotated and encoded again."""
    chat, other = Chat(model, tokens, n=150, **types), Chat(model, tokens[500:], n=40, **types)
    before, brought = everything(chat.native), everything(other.native)
    gather = mixed(chat, 110, brought.n)
    gather[..., -W:] = np.arange(150 - W, 150)
    delta = np.where(gather >= 150, np.random.default_rng(1).integers(-30, 1000, gather.shape), 0)
    delta[..., 0] = 17  # and a cell of the cache
    chat.native.compact(gather, np.r_[np.arange(110 - W) + 3, np.arange(150 - W, 150)], delta, rows=brought, portable=portable)
    after, expected = everything(chat.native), pick(joined(before, brought), gather)
    np.testing.assert_array_equal(after.v, expected.v)
    np.testing.assert_array_equal(after.k[delta == 0], expected.k[delta == 0])
    kind = types["type_k"]
    hadamard = np.eye(64) if kind in ("f16", "f32") else hadamard_matrix(64)
    keys = numbers(expected.k, kind)[delta != 0] @ hadamard
    wanted = rotate(keys, delta[delta != 0].astype(np.float64), 100000.0, 64) @ hadamard
    off = np.abs(numbers(after.k, kind)[delta != 0] - wanted).max(-1) / np.abs(wanted).max(-1)
    assert off.max() < STEP[kind]
    # the newest cells kept their positions, and so did the queries
    np.testing.assert_array_equal(chat.native.query_positions(), np.arange(150 - W, 150))
    chat.native.compact(chat.everywhere(np.arange(110)), np.arange(110), chat.everywhere(np.arange(110) // 109), portable=portable)
    assert len(chat.native.query_positions()) == 0


def test_scores_and_redundancy_of_every_type(model, tokens, types):
    text = np.concatenate([tokens[:60], tokens[:60], tokens[200:240]])
    chat = Chat(model, text, n=160, **types)
    chat.native.remove(np.array([7, 100]))
    used = np.flatnonzero(chat.native.positions() >= 0)
    for portable in (False, True):
        scores, redundancy = chat.native.scores(portable=portable), chat.native.redundancy(portable=portable)
        for layer in (0, L - 1):
            np.testing.assert_allclose(scores[layer], reference_scores(chat, layer, W), atol=1e-3)
            for head, keys in enumerate(chat.native.read_keys(layer).astype(np.float64)):
                expected, margin = reference_redundancy(keys, used)
                np.testing.assert_allclose(redundancy[layer, head] / expected.max(), expected / expected.max(), atol=1e-3 if margin > 1e-5 else 5e-3)


def chunks_of(keys, size):
    """Keys [L, H, n, bytes] in chunks of so many tokens, the last one filled up with rubbish."""
    padded = np.full((*keys.shape[:2], -(-keys.shape[2] // size) * size, keys.shape[3]), 0x3C, np.uint8)
    padded[:, :, : keys.shape[2]] = keys
    return [np.ascontiguousarray(padded[:, :, at : at + size]) for at in range(0, padded.shape[2], size)]


@pytest.mark.parametrize("moved", [([0], [0]), ([0], [700]), ([0, 1, 37, 100, 170], [5000, -3, 0, -30, 0])], ids=["stay", "all", "stretches"])
def test_scores_of_rows_are_those_of_keys_rotated_there(model, tokens, types, moved):
    chat = Chat(model, tokens, n=200, **types)
    keys = everything(chat.native).k
    shifts = np.repeat(moved[1], np.diff([*moved[0], 200])).astype(np.float64)
    hadamard = np.eye(64) if types["type_k"] in ("f16", "f32") else hadamard_matrix(64)
    for size in (64, 256):
        for options in ({"n_query": W}, {"n_query": 5}, {"n_query": 5, "largest": True}):
            scores = row_scores(chat.native, chunks_of(keys, size), 200, stretches=moved, **options)
            for layer in (0, L - 1):
                rotated = rotate(numbers(keys[layer], types["type_k"]) @ hadamard, np.broadcast_to(shifts, (3, 200)), 100000.0, 64) @ hadamard
                np.testing.assert_allclose(scores[layer], reference_scores(chat, layer, keys=rotated, **options), atol=1e-3)


def boxed(chat, keys, types=None):
    """Chunks of 256 keys [L, H, n, bytes], and their boxes as far as blocks are whole, in two goes."""
    chunks, boxes = chunks_of(keys, 256), []
    for i, chunk in enumerate(chunks):
        box = np.full((*chunk.shape[:2], 2, 64, 16), np.nan, np.float16)
        n_blocks = min(16, (keys.shape[2] - 256 * i) // BLOCK)
        for blocks in (range(5), range(5, n_blocks)):
            chat.native.fill_boxes(chunk, blocks, box, types)
        boxes.append(box)
    return chunks, boxes


def test_boxes_hold_the_keys_of_their_block(model, tokens, types):
    chat = Chat(model, tokens, n=360, **types)
    keys = everything(chat.native).k
    _, boxes = boxed(chat, keys)
    blocks = numbers(keys, types["type_k"])[:, :, : 22 * BLOCK].reshape(L, 3, 22, BLOCK, 64)
    found = np.concatenate(boxes, axis=-1)
    assert np.isnan(found[..., 22:]).all()
    np.testing.assert_array_equal(found[:, :, 0, :, :22], np.swapaxes(blocks.min(3), 2, 3).astype(np.float16))
    np.testing.assert_array_equal(found[:, :, 1, :, :22], np.swapaxes(blocks.max(3), 2, 3).astype(np.float16))


@pytest.mark.parametrize("moved", [None, ([0, 20, 37, 100, 330], [5000, -3, 0, -30, 0])], ids=["stay", "stretches"])
def test_the_best_rows_are_those_that_their_boxes_let_expect(model, tokens, types, moved):
    chat = Chat(model, tokens, n=360, **types)
    kind, keys = types["type_k"], everything(chat.native).k
    chunks, boxes = boxed(chat, keys)
    starts, shifts = moved or ([0], [0])
    shift_of = np.repeat(shifts, np.diff([*starts, 360])).astype(np.float64)
    hadamard = np.eye(64) if kind in ("f16", "f32") else hadamard_matrix(64)
    for n_query, every, n_bound, first, last, n_blocks in (
        (16, 1, 4, 16, 320, 6), (5, 1, 16, 0, 336, 21), (16, 2, 16, 32, 304, 1), (16, 1, 1, 48, 208, 0), (16, 3, 2, 16, 320, 6)
    ):  # fmt: skip
        rows, scores = best_rows(
            chat.native, chunks, boxes, 360, first=first, last=last, n_blocks=n_blocks, n_query=n_query, every=every, n_bound=n_bound, stretches=moved
        )
        assert (np.diff(rows, axis=-1) > 0).all() and rows.shape == (L, 3, first + 16 * n_blocks + 360 - last)
        np.testing.assert_array_equal(rows[..., :first], np.broadcast_to(np.arange(first), (L, 3, first)))
        np.testing.assert_array_equal(rows[..., first + 16 * n_blocks :], np.broadcast_to(np.arange(last, 360), (L, 3, 360 - last)))
        looked = np.arange(n_query)[::-every][::-1]
        n_bound = min(n_bound, len(looked))
        for layer in (0, L - 1):
            queries = chat.native.read_queries(layer).astype(np.float64)[-n_query:][looked] * chat.native.kq_scale(layer)
            asked = [len(looked) - 1 - i * len(looked) // n_bound for i in range(n_bound)]
            rotated = rotate(numbers(keys[layer], kind) @ hadamard, np.broadcast_to(shift_of, (3, 360)), 100000.0, 64) @ hadamard
            for head in range(3):
                chosen = rows[layer, head]
                # the softmax over the chosen rows alone
                q = queries[:, 3 * head : 3 * head + 3]
                logits = np.einsum("wgd,nd->wgn", q, rotated[head, chosen])
                hidden = chosen > 360 - n_query + looked[:, None]
                logits = np.where(hidden[:, None], -np.inf, logits)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                expected = (weights / weights.sum(-1, keepdims=True)).max(1).mean(0)
                np.testing.assert_allclose(scores[layer, head], expected, atol=1e-3)
                if not 0 < n_blocks < (last - first) // BLOCK:
                    continue
                # the blocks that the boxes promise most of, each met by queries in the frame of its first key
                box = np.concatenate(boxes, axis=-1)[layer, head].astype(np.float64)[..., first // BLOCK : last // BLOCK]
                back = np.repeat(-shift_of[first:last:BLOCK], 3).reshape(-1, 3)
                bound = np.empty((n_bound, 3, len(back)))
                for i, query in enumerate(asked):
                    turned = rotate((q[query] @ hadamard)[None].repeat(len(back), 0), back, 100000.0, 64) @ hadamard
                    bound[i] = np.einsum("bgc,cb->gb", np.maximum(turned, 0), box[1]) + np.einsum("bgc,cb->gb", np.minimum(turned, 0), box[0])
                weights = np.exp(bound - bound.max(-1, keepdims=True))
                promise = (weights / weights.sum(-1, keepdims=True)).max(1).mean(0)
                got = np.unique((chosen[first : first + 16 * n_blocks] - first) // BLOCK)
                assert promise[got].min() > np.sort(promise)[-n_blocks] - 1e-4 and len(got) == n_blocks


def test_wrong_boxes_are_refused(model, tokens):
    chat = Chat(model, tokens, n=360)
    chunks, boxes = boxed(chat, everything(chat.native).k)
    lib, ffi = load().lib, load().ffi
    good = {"first": 16, "last": 320, "n_blocks": 3, "n_query": 16, "n_bound": 4}
    for bad in (
        {"first": -16}, {"first": 8}, {"last": 0}, {"last": 321}, {"last": 368}, {"n_blocks": 20}, {"last": 352},
        {"n_bound": 0}, {"every": 0}, {"n_query": -1},
        {"n_rows": 513}, {"n_rows": 0, "last": 0, "first": 0, "n_blocks": 1},
    ):  # fmt: skip
        options = {"n_rows": 360} | good | bad
        with pytest.raises(NativeError) as error:
            best_rows(chat.native, chunks, boxes, **options)
        assert error.value.code == lib.KVL_ERR_ARGUMENT, bad
    for wrong in ((chunks, boxes[:1]), ([chunk[:, :, :128].copy() for chunk in chunks], boxes), (chunks, [box.view(np.int16) for box in boxes])):
        with pytest.raises(ValueError):
            best_rows(chat.native, *wrong, 360, **good)
    for blocks in (range(-1, 3), range(17, 18), range(3, 17)):
        with pytest.raises(NativeError) as error:
            chat.native.fill_boxes(chunks[0], blocks, boxes[0])
        assert error.value.code == lib.KVL_ERR_ARGUMENT
    with pytest.raises(NativeError):
        chat.native.fill_boxes(chunks[0][:, :, :128].copy(), range(1), np.zeros((L, 3, 2, 64, 8), np.float16))
    keys, box = ffi.from_buffer("uint8_t[]", chunks[0]), ffi.cast("uint16_t *", ffi.from_buffer(boxes[0]))
    size, context, f16 = boxes[0].nbytes, chat.native._context, chat.native.layout().type_k
    assert lib.kvl_get_boxes(context, ffi.NULL, f16, 256, 0, 1, box, size, L, 3) == lib.KVL_ERR_ARGUMENT
    assert lib.kvl_get_boxes(context, keys, f16, 256, 0, 1, ffi.NULL, size, L, 3) == lib.KVL_ERR_ARGUMENT
    assert lib.kvl_get_boxes(context, keys, f16, 256, 0, 1, box, size - 1, L, 3) == lib.KVL_ERR_ARGUMENT
    assert lib.kvl_get_boxes(context, keys, f16, 256, 0, 1, box, size, L, 2) == lib.KVL_ERR_ARGUMENT


def test_wrong_stretches_are_refused(model, tokens):
    chat = Chat(model, tokens, n=60)
    chunks, lib, ffi = chunks_of(everything(chat.native).k, 64), load().lib, load().ffi
    for starts, shifts in (([1], [0]), ([0, 0], [1, 2]), ([0, 20, 10], [1, 2, 3]), ([0, 60], [1, 2]), ([-1, 5], [1, 2]), ([0], [-(2**31)])):
        with pytest.raises(NativeError) as error:
            row_scores(chat.native, chunks, 60, stretches=(starts, shifts))
        assert error.value.code == lib.KVL_ERR_ARGUMENT
    with pytest.raises(ValueError, match="starts and shifts"):
        row_scores(chat.native, chunks, 60, stretches=([0, 1], [0]))
    queries = chat.native.copy_queries(stretches=([0], [3]))
    pointers, scores = ffi.new("uint8_t *[]", [ffi.cast("uint8_t *", chunks[0].ctypes.data)]), np.zeros((L, 3, 60), np.float32)
    for starts, shifts, n in ((ffi.NULL, ffi.new("int32_t[]", 1), 1), (ffi.new("int32_t[]", 1), ffi.NULL, 1), (ffi.NULL, ffi.NULL, -1)):
        out, f16 = floats(scores), chat.native.layout().type_k
        assert lib.kvl_get_row_scores(queries._handle, 0, pointers, f16, 1, 64, starts, shifts, n, out, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    start, shift = ffi.new("int32_t[]", 1), ffi.new("int32_t[]", [4])
    assert lib.kvl_get_row_scores(queries._handle, 0, pointers, f16, 1, 64, start, shift, 1, out, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert b"not copied for keys that are moved by 4 positions" in ffi.string(lib.kvl_last_error())


def test_wrong_copies_of_queries_are_refused(model, tokens):
    chat, lib, ffi = Chat(model, tokens, n=60), load().lib, load().ffi
    context, null, out = chat.native._context, ffi.NULL, ffi.new("struct kvl_queries **")
    one = ffi.new("int32_t[]", 1)
    for wrong in (
        (null, 0, W, 1, 0, null, 0, out), (context, 0, W, 1, 0, null, 0, null),
        (context, 1, W, 1, 0, null, 0, out), (context, -1, W, 1, 0, null, 0, out),
        (context, 0, -1, 1, 0, null, 0, out), (context, 0, W, 0, 0, null, 0, out),
        (context, 0, W, 1, lib.KVL_LARGEST, null, 0, out), (context, 0, W, 1, 0, null, 1, out), (context, 0, W, 1, 0, one, -1, out),
    ):  # fmt: skip
        assert lib.kvl_copy_queries(*wrong) == lib.KVL_ERR_ARGUMENT and out[0] == null, wrong
    chunk = chunks_of(everything(chat.native).k, 64)[0]
    pointers, scores = ffi.new("uint8_t *[]", [ffi.cast("uint8_t *", chunk.ctypes.data)]), ffi.new("float[]", L * 3 * 60)
    f16 = chat.native.layout().type_k
    handle = chat.native.copy_queries()._handle
    for queries, flags, shape in ((null, 0, (L, 3)), (handle, lib.KVL_PORTABLE, (L, 3)), (handle, 0, (L, 2)), (handle, 0, (L + 1, 3))):
        assert lib.kvl_get_row_scores(queries, flags, pointers, f16, 1, 64, null, null, 0, scores, *shape, 60) == lib.KVL_ERR_ARGUMENT


def test_queries_that_were_copied_outlive_what_the_context_does_next(model, tokens):
    """They are what they were, whatever is decoded since, and when the context is gone."""
    chat = Chat(model, tokens, n=60)
    chunks, expected = chunks_of(everything(chat.native).k, 64), chat.native.scores()
    queries = [chat.native.copy_queries(beside=beside) for beside in (False, True)]
    chat.context.decode(tokens[60:100], 60)
    for one in queries:
        np.testing.assert_allclose(one.row_scores(chunks, 60), expected, atol=device.tolerance(1e-6, 1e-4))
    chat.context.close()
    np.testing.assert_allclose(queries[1].row_scores(chunks, 60), expected, atol=device.tolerance(1e-6, 1e-4))


@pytest.mark.parametrize("portable", [False, True])
def test_other_sequences_stay_as_they_are(model, tokens, types, portable):
    context = Context(model, n_cells=256, n_ubatch=128, n_seq_max=3, **types)
    natives = [NativeCache(context.pointer, seq) for seq in range(3)]
    for seq in range(3):
        context.decode(tokens[seq * 10 :][:100], 0, seq=seq)
    before = [everything(native) for native in natives]
    gather = np.broadcast_to(np.r_[100:140, 40:100], (L, 3, 100))
    natives[1].compact(gather, np.arange(100), rows=before[2], portable=portable)
    assert_same(everything(natives[0]), before[0])
    assert_same(everything(natives[1]), pick(joined(before[1], before[2]), gather))
    assert_same(everything(natives[2]), before[2])


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_heads_whose_rows_are_no_whole_words(tmp_path, monkeypatch, family, portable):
    """A head of 32 numbers takes 34 bytes in q8_0; gemma3 has sliding-window layers beside."""
    monkeypatch.setattr(tiny_model, "HEAD", 32)
    tiny_model.write_tiny_model(tmp_path / "tiny.gguf", family, n_layer=12 if family == "gemma3" else 2)
    with Model(tmp_path / "tiny.gguf") as model:
        if not supported(model, "q8_0", "q5_0"):
            pytest.skip("this device has no attention for heads of this size")
        text = np.random.default_rng(0).integers(0, model.n_vocab, 200).astype(np.int32)
        chat = Chat(model, text, n=80, n_cells=256, n_threads=1, type_k="q8_0", type_v="q5_0")
        layout = chat.native.layout()
        assert (layout.row_size_k, layout.row_size_v) == (34, 22) and layout.is_swa == (family == "gemma3")
        before = everything(chat.native)
        shape = (layout.n_layer, layout.n_head_kv, 60)
        gather = np.broadcast_to(np.r_[90:110, 20:40, 60:80], shape)
        chat.native.compact(gather, np.r_[:40, 60:80], rows=before, portable=portable)
        assert_same(everything(chat.native), pick(joined(before, before), gather))
        delta = np.where(gather >= 80, 5, 0)
        chat.native.compact(np.broadcast_to(np.arange(60), shape), np.r_[:40, 60:80], delta, portable=portable)
        after = everything(chat.native)
        np.testing.assert_array_equal(after.k[delta == 0], pick(joined(before, before), gather).k[delta == 0])
        assert (after.k[delta != 0] != pick(joined(before, before), gather).k[delta != 0]).any(-1).all()
        chat.n_past = 80
        assert np.isfinite(chat.feed(3, 1)).all()


def test_wrong_rows_are_refused_and_change_nothing(model, tokens):
    chat = Chat(model, tokens, n=60, n_cells=256)
    native, lib, ffi = chat.native, load().lib, load().ffi
    before = everything(native)
    good = np.broadcast_to(np.arange(60), (L, 3, 60))
    for gather, positions, rows in (
        (good + 60, np.arange(60), None),
        (good + 61, np.arange(60), before),
        (good - 1, np.arange(60), before),
        (np.full((L, 3, 60), 2**31 - 1), np.arange(60), before),
        (np.zeros((L, 3, 257)), np.arange(257), before),
        (good, np.arange(60)[::-1], before),
    ):
        with pytest.raises(NativeError) as error:
            native.compact(gather, positions, rows=rows)
        assert error.value.code == lib.KVL_ERR_ARGUMENT
    half = Rows(before.k[:, :, :30], before.v[:, :, :30])
    for bad in (Rows(before.k[..., :-1], before.v), Rows(before.k, before.v[:1]), Rows(before.k.astype(np.int16), before.v), [before, half]):
        with pytest.raises(ValueError, match="rows of this cache must be"):
            native.compact(good, np.arange(60), rows=bad)
    for cells in ([60], [-1]):
        with pytest.raises(NativeError) as error:
            native.read_rows(np.array(cells))
        assert error.value.code == lib.KVL_ERR_ARGUMENT

    def code(rows, flags=0, n_cells=60):
        gather = ints(np.ascontiguousarray(good, np.int32))
        result = lib.kvl_compact(native._context, 0, gather, ints(np.arange(60, dtype=np.int32)), ffi.NULL, rows, flags, L, 3, 60, n_cells)
        assert result < 0 and ffi.string(lib.kvl_last_error())
        return result

    wrong = [{"k": ffi.NULL}, {"v": ffi.NULL}, {"k": ffi.new("uint8_t *[1]")}, {"v": ffi.new("uint8_t *[1]")}, {"n_bytes_k": 5}, {"n_bytes_v": 2**40}]
    wrong += [{name: value} for name in ("n_rows", "n_chunk", "chunk_size") for value in (0, -1)] + [{"n_rows": 61}]
    for change in wrong:
        rows, *_pointers = native._rows([before])
        for name, value in change.items():
            setattr(rows, name, value)
        assert code(rows) == lib.KVL_ERR_ARGUMENT
        assert lib.kvl_read_rows(native._context, 0, ints(np.arange(60, dtype=np.int32)), rows, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert code(ffi.NULL, flags=lib.KVL_LARGEST) == lib.KVL_ERR_ARGUMENT
    assert code(ffi.NULL, n_cells=59) == lib.KVL_ERR_STATE
    rows, *_pointers = native._rows([before])
    cells = ints(good[0, 0].astype(np.int32))
    assert lib.kvl_read_rows(native._context, 0, ffi.NULL, rows, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert lib.kvl_read_rows(native._context, 7, cells, rows, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    # read into one chunk of its own size alone
    rows.n_rows = 50
    assert lib.kvl_read_rows(native._context, 0, cells, rows, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    rows, *_pointers = native._rows([before, before])
    rows.n_rows = 60
    assert lib.kvl_read_rows(native._context, 0, cells, rows, L, 3, 60) == lib.KVL_ERR_ARGUMENT
    assert_same(everything(native), before)
    native.remove(np.array([10]))
    with pytest.raises(NativeError, match="cell 10 is empty"):
        native.read_rows(np.arange(60))
    chat.context.clear()
    with pytest.raises(NativeError, match="no cells"):
        native.compact(good, np.arange(60))


def test_types_that_the_device_has_no_attention_for_are_refused(model):
    """All types are for the CPU; CUDA has none for iq4_nl."""
    backends = diagnose()["library"]["backends"]
    refused = [kind for kind in KV_TYPES if not supported(model, kind, "f16")]
    if device.on_cpu():
        assert refused == []
    elif "CUDA" in backends:
        assert refused == ["iq4_nl"]
    else:
        pytest.skip(f"nothing is said here about what {', '.join(backends)} can do")
