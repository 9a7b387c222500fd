from pathlib import Path

import numpy as np
import pytest
from shallow_model import write_shallow_model
from tiny_model import HEAD, N_EMBD, N_HEAD, N_HEAD_KV, N_VOCAB, WINDOW, write_tiny_model

from kvlocal.gguf.container import Container
from kvlocal.llama.adapter import Adapter as RuntimeAdapter
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal.nexus.base import base_hash
from kvlocal.nexus.file import NexusFile

torch = pytest.importorskip("torch")

from kvlocal.training.decoder import Cells, Decoder  # noqa: E402
from kvlocal.training.parameters import Parameters  # noqa: E402
from kvlocal.training.weights import FAMILIES, Weights, WeightsError  # noqa: E402

TEXT = (
    "The lighthouse keeper wrote in his journal every evening. On the last page he had drawn a map of the coast, with the rocks, the "
    "currents and the names of the ships that had come to grief on them. Nobody had asked him to, and nobody but the sea ever read it."
)


class RoundedDecoder(Decoder):
    """Rounds keys and values to float16, as an f16 cache does."""

    def _project(self, *args):
        q, cells = super()._project(*args)
        return q, Cells(cells.keys.half().float(), cells.values.half().float())


def decoder_of(path: Path, kind: type[Decoder] = RoundedDecoder) -> Decoder:
    return kind(Weights.load(Container(path), torch.float32, "cpu"))


def causal(n: int) -> "torch.Tensor":
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril()


def context_of(model: Model) -> Context:
    return Context(model, n_cells=512, n_ubatch=256, n_threads=1, n_outputs=256)


def assert_same_predictions(found: "torch.Tensor", expected: np.ndarray) -> None:
    """Logits [n, n_vocab]."""
    difference = (found.softmax(-1) - torch.from_numpy(expected).softmax(-1)).abs().max().item()
    assert difference < 1e-3


def assert_tokens_agree(path: Path, tokens: np.ndarray) -> None:
    with Model(path) as model, context_of(model) as context:
        context.decode(tokens, 0, logits="all")
        expected = context.logits_all()
    decoder = decoder_of(path)
    with torch.no_grad():
        out = decoder.forward(decoder.embed(torch.from_numpy(tokens).long()), torch.arange(len(tokens)), causal(len(tokens)))
        assert_same_predictions(decoder.logits(out.hidden), expected)


# Against llama.cpp


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights(family: str, tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    # of gemma3 the sixth layer has no window, and others must have passed the end of theirs
    write_tiny_model(path, family, n_layer=6 if family == "gemma3" else 2, tied=tied)
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, 3 * WINDOW).astype(np.int32)
    assert_tokens_agree(path, tokens)


def tokens_of(path: Path) -> np.ndarray:
    with Model(path) as model:
        return model.tokenize(TEXT, parse_special=False, add_special=True)


def test_smollm2(three_layers: Path) -> None:
    assert_tokens_agree(three_layers, tokens_of(three_layers))


def test_gemma3(gemma3: Path, tmp_path: Path) -> None:
    write_shallow_model(gemma3, tmp_path / "gemma3.gguf", 6)
    assert_tokens_agree(tmp_path / "gemma3.gguf", tokens_of(tmp_path / "gemma3.gguf"))


def nexus_file(path: Path, decoder: Decoder, k: int, half: bool) -> tuple[Parameters, NexusFile]:
    """Parameters that are far from their start, and the file of them."""
    parameters = Parameters.new(decoder.weights, k, 4, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, b in parameters.pairs.values():
            b += 0.3 * torch.randn(b.shape, generator=generator)
        for leaf in parameters.adapter_leaves if half else ():
            leaf.copy_(leaf.half().float())
    kind = np.float16 if half else np.float32
    return parameters, NexusFile(
        table=parameters.table.detach().numpy(),
        adapter={name: tuple(part.detach().numpy().astype(kind) for part in pair) for name, pair in parameters.pairs.items()},
        alpha=parameters.alpha,
        architecture=decoder.hyper.family,
        base_name="base",
        base_hash=base_hash(Container(path)),
        ratios=(0.8,),
    )


def assert_injection_agrees(path: Path, tokens: np.ndarray, tmp_path: Path, half: bool) -> None:
    """Tokens, then Nexus embeddings with the adapter on, then tokens with it off, at train time and at run time."""
    k, n = 5, len(tokens)
    decoder = decoder_of(path)
    parameters, file = nexus_file(path, decoder, k, half)
    file.save(tmp_path / "a.nexus.gguf")
    with Model(path) as model:
        adapter = RuntimeAdapter(model, tmp_path / "a.nexus.gguf")
        with context_of(model) as context:
            context.decode(tokens, 0, logits="none")
            context.use_adapter(adapter)
            context.decode_embeddings(file.table, n, logits="all")
            injected = context.logits_all()
            context.use_adapter(None)
            context.decode(tokens, n + k, logits="all")
            after = context.logits_all()
    with torch.no_grad():
        x = decoder.embed(torch.from_numpy(tokens).long())
        rows = torch.arange(n, n + k)
        seen = causal(2 * n + k)
        positions = torch.arange(2 * n + k)
        adapter = parameters.adapter(torch.float32, rows)
        out = decoder.forward(torch.cat([x, parameters.table, x]), positions, seen, adapter=adapter)
        logits = decoder.logits(out.hidden)
        assert_same_predictions(logits[rows], injected)
        assert_same_predictions(logits[n + k :], after)
        # and the adapter does something
        plain = decoder.logits(decoder.forward(torch.cat([x, parameters.table, x]), positions, seen).hidden)
        assert (plain[n:].softmax(-1) - logits[n:].softmax(-1)).abs().max() > 0.01


@pytest.mark.parametrize("half", [False, True])
def test_injection_into_smollm2(three_layers: Path, tmp_path: Path, half: bool) -> None:
    assert_injection_agrees(three_layers, tokens_of(three_layers), tmp_path, half)


@pytest.mark.parametrize("family", FAMILIES)
def test_injection_into_random_weights(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf", family, n_layer=6 if family == "gemma3" else 2)
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, 40).astype(np.int32)
    assert_injection_agrees(tmp_path / "tiny.gguf", tokens, tmp_path, half=False)


# Within itself


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_model(path, request.param, n_layer=6 if request.param == "gemma3" else 2)
    return decoder_of(path, Decoder)


def random_rows(decoder: Decoder, n: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Embeddings, and a visibility of its own for each layer and KV head."""
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(decoder.hyper.n_layer, N_HEAD_KV, n, n, generator=generator) < 0.5
    return torch.randn(n, N_EMBD, generator=generator), (seen & causal(n)) | torch.eye(n, dtype=torch.bool)


def test_visibility_masses_and_watched_rows(tiny: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 30
    x, seen = random_rows(tiny, n)
    sets = (torch.rand(tiny.hyper.n_layer, N_HEAD_KV, n, 3, generator=torch.Generator().manual_seed(4)) < 0.3).float()
    positions = torch.arange(n) * 2
    weights = []

    def slow_attention(q, keys, values, attn_mask, scale):
        """Softmax over the columns each row sees, found one by one; [H_kv, G, T, d]."""
        i = len(weights)
        q, keys = q[..., :HEAD], keys[..., :HEAD]
        window = tiny.hyper.windows[i]
        p = torch.zeros(*q.shape[:3], n)
        for head in range(N_HEAD_KV):
            for row in range(n):
                columns = [
                    column for column in range(n)
                    if seen[i, head, row, column] and (window is None or positions[row] - positions[column] < window)
                ]  # fmt: skip
                p[head, :, row, columns] = (q[head, :, row] @ keys[head, 0, columns].T * scale).softmax(-1)
        weights.append(p)
        return p @ values

    with torch.no_grad():
        fast = tiny.forward(x, positions, seen, columns=sets, watch=torch.tensor([7, 29]))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", slow_attention)
        slow = tiny.forward(x, positions, seen, columns=sets)
    assert torch.allclose(fast.hidden, slow.hidden, atol=1e-3)
    for i, p in enumerate(weights):
        assert torch.allclose(fast.masses[i], (p @ sets[i][:, None]).flatten(0, 1), atol=1e-4)
        assert torch.allclose(fast.watched[i], p[:, :, [7, 29]].amax(1), atol=1e-4)
    assert fast.masses.shape == (tiny.hyper.n_layer, N_HEAD, n, 3)


def test_rows_in_two_parts(tiny: Decoder) -> None:
    n, first = 40, 13
    x, seen = random_rows(tiny, n)
    positions = torch.arange(n)
    with torch.no_grad():
        whole = tiny.forward(x, positions, seen)
        begin = tiny.forward(x[:first], positions[:first], seen[:, :, :first, :first])
        past = [cells.first(first) for cells in whole.cells]
        end = tiny.forward(x[first:], positions[first:], seen[:, :, first:], past=past, past_positions=positions[:first])
    assert torch.allclose(torch.cat([begin.hidden, end.hidden]), whole.hidden, atol=1e-4)


def test_the_adapter_touches_its_rows_alone(tiny: Decoder) -> None:
    parameters = Parameters.new(tiny.weights, 4, 2, 0)
    with torch.no_grad():
        for _, b in parameters.pairs.values():
            b += 1
    x, _ = random_rows(tiny, 20)
    alone = torch.eye(20, dtype=torch.bool)[None, None]
    with torch.no_grad():
        plain = tiny.forward(x, torch.arange(20), alone).hidden
        adapted = tiny.forward(x, torch.arange(20), alone, adapter=parameters.adapter(torch.float32, torch.tensor([4, 9]))).hidden
    changed = (plain != adapted).any(-1)
    assert changed.nonzero().flatten().tolist() == [4, 9]


def test_bfloat16_is_near(tiny: Decoder, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf", tiny.hyper.family, n_layer=tiny.hyper.n_layer)
    half = Decoder(Weights.load(Container(tmp_path / "tiny.gguf"), torch.bfloat16, "cpu"))
    tokens = torch.arange(60)
    with torch.no_grad():
        p, q = (d.logits(d.forward(d.embed(tokens), tokens, causal(60)).hidden).float().log_softmax(-1) for d in (tiny, half))
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.05


# What it does not know


def test_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_tiny_model(path, "llama")
    content = path.read_bytes()
    for before, after, sentence in (
        (b"llama", b"mamba", "a mamba model"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_up.weighx", "has a blk.1.ffn_up.weighx"),
        (b"attention.layer_norm_rms_epsilon", b"attention.layer_norm_rms_epsilox", "layer_norm_rms_epsilon"),
    ):
        path.write_bytes(content.replace(before, after))
        with pytest.raises(WeightsError, match=sentence):
            decoder_of(path)
