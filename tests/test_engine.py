import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import device
import gguf
import numpy as np
import pytest

from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.errors import CacheFull, EngineError
from kvlocal.llama.library import load
from kvlocal.llama.model import Model

pytestmark = pytest.mark.device

PROMPT = (
    "The lighthouse keeper wrote in his journal every evening, and on the last page he had drawn a map of the coast"
)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Model]:
    with Model(smollm2) as model:
        yield model


@pytest.fixture(scope="module")
def shared(model: Model) -> Iterator[Context]:
    with Context(model, n_cells=256, n_ubatch=64) as context:
        yield context


@pytest.fixture
def context(shared: Context) -> Context:
    shared.clear()
    return shared


@pytest.fixture(scope="module")
def tokens(model: Model) -> np.ndarray:
    return model.tokenize(PROMPT, parse_special=False)


def test_attributes(model: Model) -> None:
    assert (model.n_ctx_train, model.n_embd, model.n_layer, model.n_vocab) == (8192, 576, 30, 49152)
    assert 130e6 < model.n_params < 140e6
    assert 0 < model.size_bytes < model.path.stat().st_size
    assert model.metadata["general.architecture"] == "llama"
    assert "<|im_start|>" in model.metadata["tokenizer.chat_template"]
    assert model.n_swa == 0
    assert (model.bos, model.add_bos) == (1, False)
    assert {model.token_bytes(token, special=True) for token in model.end_tokens} >= {b"<|im_end|>", b"<|endoftext|>"}


def test_the_whole_of_a_long_metadata_value_is_read(model: Model) -> None:
    assert len(model.metadata["tokenizer.chat_template"]) > 256
    assert model.metadata["tokenizer.chat_template"].rstrip().endswith("%}")


@pytest.mark.parametrize("text", ["", "a", " a ", "日本語 👍🏽\n\n\tx", "nul\0inside", "<|im_end|>", "x" * 5000])
def test_plain_text_round_trip(model: Model, text: str) -> None:
    tokens = model.tokenize(text, parse_special=False)
    assert tokens.dtype == np.int32
    assert model.detokenize(tokens) == text


def test_control_tokens_come_from_text_only_when_asked(model: Model) -> None:
    (end,) = model.tokenize("<|im_end|>", parse_special=True)
    assert end in model.end_tokens
    assert not model.end_tokens & set(model.tokenize("a<|im_end|>\n<|endoftext|>", parse_special=False).tolist())
    assert model.token_bytes(int(end)) == b""
    assert model.token_bytes(int(end), special=True) == b"<|im_end|>"


def test_surrogates_do_not_break_the_tokenizer(model: Model) -> None:
    assert model.detokenize(model.tokenize("a\udcffb", parse_special=False)) == "a?b"


def test_no_such_token(model: Model) -> None:
    for token in (-1, model.n_vocab):
        with pytest.raises(EngineError, match="no token"):
            model.token_bytes(token)


def assert_same_predictions(logits: np.ndarray, expected: np.ndarray) -> None:
    """Logits [n, n_vocab] of the same tokens in other batches.

    A GPU multiplies single tokens and batches by different operations, whose sums round differently: logits of a model in Q4_1 are up to 3 apart,
    and where the two most likely tokens are nearer than that either may come first.
    """
    bound = device.tolerance(0.5, 4)
    assert np.abs(logits - expected).max() < bound
    ahead = np.sort(expected, axis=1)
    clear = ahead[:, -1] - ahead[:, -2] > device.tolerance(0, 2 * bound)
    assert np.array_equal(logits.argmax(1)[clear], expected.argmax(1)[clear])


def test_one_batch_equals_token_by_token(context: Context, tokens: np.ndarray) -> None:
    context.decode(tokens, 0, logits="all")
    together = context.logits_all()
    assert together.shape == (len(tokens), context.model.n_vocab)
    context.clear()
    singly = []
    for pos, token in enumerate(tokens):
        context.decode([token], pos)
        singly.append(context.logits())
    assert_same_predictions(together, np.array(singly))


def test_micro_batches_continue_each_other(context: Context, tokens: np.ndarray) -> None:
    context.decode(tokens, 0)
    whole = context.logits()
    context.clear()
    context.decode(tokens[:7], 0, logits="none")
    context.decode(tokens[7:], 7)
    assert context.pos_max() == len(tokens) - 1
    assert_same_predictions(context.logits()[None], whole[None])


def test_greedy_decoding_is_deterministic(context: Context, tokens: np.ndarray) -> None:
    runs = []
    for _ in range(2):
        context.clear()
        context.decode(tokens, 0)
        run = [int(context.logits().argmax())]
        for pos in range(len(tokens), len(tokens) + 8):
            context.decode(run[-1:], pos)
            run.append(int(context.logits().argmax()))
        runs.append(run)
    assert runs[0] == runs[1]


def test_logits_by_index(context: Context, tokens: np.ndarray) -> None:
    context.decode(tokens[:5], 0, logits="all")
    rows = context.logits_all()
    for i in range(5):
        assert np.array_equal(context.logits(i), rows[i])
        assert np.array_equal(context.logits(i - 5), rows[i])
    context.decode(tokens[5:8], 5)
    assert np.array_equal(context.logits(2), context.logits())
    for i in (0, 1, 3, -2):
        with pytest.raises(EngineError, match="no logits"):
            context.logits(i)
    with pytest.raises(EngineError, match="no logits"):
        context.logits_all()


def test_logits_are_a_copy(context: Context, tokens: np.ndarray) -> None:
    context.decode(tokens[:3], 0)
    before = context.logits()
    kept = before.copy()
    context.decode(tokens[3:6], 3)
    assert np.array_equal(before, kept)


def test_outputs_are_limited_to_what_was_asked(model: Model, tokens: np.ndarray) -> None:
    with Context(model, n_cells=256, n_ubatch=32, n_outputs=1) as context:
        context.decode(tokens[:8], 0)
        assert context.logits().shape == (model.n_vocab,)
        with pytest.raises(EngineError, match="n_outputs"):
            context.decode(tokens[8:10], 8, logits="all")
        assert context.pos_max() == 7


def test_embeddings_of_tokens_equal_the_tokens(context: Context, tokens: np.ndarray) -> None:
    tensors = gguf.GGUFReader(context.model.path).tensors
    table = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    embd = gguf.dequantize(table.data[tokens], table.tensor_type)
    context.decode(tokens, 0)
    expected = context.logits()
    context.clear()
    context.decode_embeddings(embd[:-1], 0)
    assert context.pos_max() == len(tokens) - 2
    with pytest.raises(EngineError, match="no logits"):
        context.logits()
    context.decode_embeddings(embd[-1:], len(tokens) - 1, logits="last")
    assert_same_predictions(context.logits()[None], expected[None])
    with pytest.raises(EngineError, match="shape"):
        context.decode_embeddings(np.zeros((2, 7)), len(tokens))


def test_full_cache_is_told_and_changes_nothing(context: Context) -> None:
    assert context.n_cells == 256
    filler = np.full(64, 5, dtype=np.int32)
    for pos in (0, 64, 128):
        context.decode(filler, pos, logits="none")
    context.decode(filler[:60], 192, logits="none")
    with pytest.raises(CacheFull, match="256 cells"):
        context.decode(filler[:5], 252)
    assert context.pos_max() == 251
    context.decode(filler[:4], 252)
    with pytest.raises(CacheFull):
        context.decode([5], 256)
    context.remove(0, 250, -1)
    context.decode([5], 250)
    assert context.pos_max() == 250


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.decode([], 0), "1 to 64"),
        (lambda c: c.decode([1] * 65, 0), "1 to 64"),
        (lambda c: c.decode([[1, 2]], 0), "one dimension"),
        (lambda c: c.decode([1], -1), "position"),
        (lambda c: c.decode([1], 0, seq=1), "no sequence 1"),
        (lambda c: c.decode([1], 0, seq=-1), "no sequence -1"),
        (lambda c: c.decode([-1], 0), "vocabulary"),
        (lambda c: c.decode([49152], 0), "vocabulary"),
        (lambda c: c.decode([1], 0, logits="some"), "'some'"),
        (lambda c: (c.decode([1, 2], 0), c.decode([3], 1)), "ends at 1"),
        (lambda c: c.pos_max(3), "no sequence 3"),
        (lambda c: c.state_set(0, b"nonsense"), "does not fit"),
        (lambda c: c.state_set(0, b""), "does not fit"),
    ],
)
def test_wrong_arguments(context: Context, call: Callable[[Context], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        call(context)
    # and the context still works
    context.clear()
    context.decode([1, 2], 0)
    assert np.isfinite(context.logits()).all()


def test_state_round_trip_gives_the_same_logits(model: Model, context: Context, tokens: np.ndarray) -> None:
    context.decode(tokens[:-1], 0, logits="none")
    state = context.state_get()
    context.decode(tokens[-1:], len(tokens) - 1)
    expected = context.logits()

    context.clear()
    context.state_set(0, state)
    assert context.pos_max() == len(tokens) - 2
    with pytest.raises(EngineError, match="no logits"):
        context.logits()
    context.decode(tokens[-1:], len(tokens) - 1)
    assert np.array_equal(context.logits(), expected)

    other = Context(model, n_cells=256, n_ubatch=64, type_k="q8_0", type_v="q8_0")
    with other, pytest.raises(EngineError, match="same cache types"):
        other.state_set(0, state)


def test_q8_0_cache_is_smaller_and_close(model: Model, context: Context, tokens: np.ndarray) -> None:
    context.decode(tokens, 0)
    with Context(model, n_cells=256, n_ubatch=64, type_k="q8_0", type_v="q8_0") as small:
        small.decode(tokens, 0)
        assert small.logits().argmax() == context.logits().argmax()
        assert np.abs(small.logits() - context.logits()).max() < 2
        # keys and values of 30 layers with 3 KV heads of 64, 2 bytes each, or 34 bytes per 32
        assert context.kv_bytes() == pytest.approx(256 * 30 * 2 * 3 * 64 * 2, rel=0.01)
        assert small.kv_bytes() == pytest.approx(context.kv_bytes() * 34 / 64, rel=0.01)


def test_sequences_have_streams_of_their_own(model: Model, context: Context, tokens: np.ndarray) -> None:
    context.decode(tokens, 0)
    expected = context.logits()
    with Context(model, n_cells=100, n_ubatch=64, n_seq_max=2) as two:
        assert (two.n_cells, two.n_seq_max) == (256, 2)
        two.decode(np.full(64, 5), 0, seq=0, logits="none")
        two.decode(tokens, 0, seq=1)
        assert two.logits().argmax() == expected.argmax()
        assert (two.pos_max(0), two.pos_max(1)) == (63, len(tokens) - 1)
        two.clear(0)
        assert (two.pos_max(0), two.pos_max(1)) == (-1, len(tokens) - 1)


@pytest.mark.parametrize(
    "wrong", [{"n_cells": 0}, {"n_cells": 2**31}, {"n_cells": 64, "type_k": "q9"}, {"n_cells": 64, "n_seq_max": 0}, {"n_cells": 64, "n_threads": -1}]
)
def test_impossible_contexts(model: Model, wrong: dict[str, object]) -> None:
    with pytest.raises(EngineError):
        Context(model, **wrong)


def test_files_that_are_no_models(tmp_path: Path, smollm2: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        Model(tmp_path / "missing.gguf")
    with pytest.raises(EngineError, match="cannot be read"):
        Model(tmp_path)
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    with pytest.raises(EngineError, match="not a GGUF file"):
        Model(text)
    for n_bytes, reason in ((64, "damaged or cut off"), (20_000_000, "not within the file bounds")):
        cut = tmp_path / "cut.gguf"
        with smollm2.open("rb") as file:
            cut.write_bytes(file.read(n_bytes))
        with pytest.raises(EngineError, match=reason):
            Model(cut)


def test_a_closed_model_closes_its_contexts_and_says_so(smollm2: Path) -> None:
    with Model(smollm2) as model:
        context = Context(model, n_cells=256, n_ubatch=32)
        context.decode([1, 2], 0)
    assert context.closed and model.closed
    for call in (
        lambda: context.decode([3], 2),
        context.logits,
        context.clear,
        context.state_get,
        context.synchronize,
        lambda: context.pointer,
        lambda: model.tokenize("a", parse_special=False),
        lambda: model.token_bytes(17),
        lambda: model.end_tokens,
        lambda: Context(model, n_cells=256),
    ):
        with pytest.raises(EngineError, match="closed"):
            call()
    context.close()
    model.close()


def test_objects_left_open_end_with_the_interpreter_in_the_right_order(smollm2: Path) -> None:
    script = (
        "import sys; from kvlocal.llama.model import *; from kvlocal.llama.context import *; from kvlocal.llama.sampling import *\n"
        "model = Model(sys.argv[1]); context = Context(model, n_cells=256, n_ubatch=32)\n"
        "sampler = Sampler(model, SamplingParams()); context.decode([1, 2], 0); sampler.sample(context)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, smollm2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("n_gpu_layers, offloads", [(0, False), (-1, True), (3, True)])
def test_without_layers_on_a_gpu_nothing_is_sent_there(smollm2: Path, monkeypatch: pytest.MonkeyPatch, n_gpu_layers: int, offloads: bool) -> None:
    lib, seen = load().llama_cpp, []
    make = lib.llama_init_from_model
    monkeypatch.setattr(lib, "llama_init_from_model", lambda model, params: (seen.append(bool(params.op_offload)), make(model, params))[1])
    with Model(smollm2, n_gpu_layers=n_gpu_layers, placement=None) as model, Context(model, n_cells=256, n_ubatch=32):
        assert seen == [offloads]


def test_how_many_queries_are_recorded_is_decided_once(model: Model) -> None:
    with Context(model, n_cells=256, n_ubatch=64, n_recorded=16, n_seq_max=2) as context:
        assert context.n_recorded == NativeCache(context.pointer).layout().n_window == 16
    with pytest.raises(EngineError, match="65 queries cannot be recorded"):
        Context(model, n_cells=256, n_ubatch=64, n_recorded=65)


def test_the_lowest_position(context: Context, tokens: np.ndarray) -> None:
    assert context.pos_min() == -1
    context.decode(tokens, 0)
    assert (context.pos_min(), context.pos_max()) == (0, len(tokens) - 1)
