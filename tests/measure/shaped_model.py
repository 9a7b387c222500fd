"""A GGUF with the shape of a well-known model and random Q8_0 weights, for what depends on shapes alone: speed, memory, planning."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType, GGUFWriter


@dataclass(frozen=True)
class Shape:
    """Of a decoder of the family llama, qwen3 or gemma3.

    head: numbers of a key and of a value of one head
    window: of the layers with a sliding window, 0 without any
    """

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_ctx_train: int
    rope_base: float
    head: int = 128
    family: str = "llama"
    window: int = 0


# from the models' config.json
SHAPES = {
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 131072, 500000.0),
    "llama3-1b": Shape(16, 2048, 8192, 32, 8, 131072, 500000.0, head=64),
    "qwen3-8b": Shape(36, 4096, 12288, 32, 8, 40960, 1000000.0, family="qwen3"),
    "gemma3-12b": Shape(48, 3840, 15360, 16, 8, 131072, 1000000.0, head=256, family="gemma3", window=1024),
}


def write_shaped_model(vocabulary: Path, target: Path, shape: Shape) -> None:
    """Writes a model of that shape with the tokens and the chat template of another one."""
    writer = GGUFWriter(target, shape.family)
    for key, field in GGUFReader(vocabulary).fields.items():
        if key.startswith("tokenizer."):
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    n_vocab = len(GGUFReader(vocabulary).fields["tokenizer.ggml.tokens"].data)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    if shape.window:
        writer.add_sliding_window(shape.window)
    rng = np.random.default_rng(0)
    tensors = list(_tensors(shape, n_vocab))
    for name, rows, columns in tensors:
        if rows:
            writer.add_tensor_info(name, (rows, columns // 32 * 34), np.dtype(np.uint8), rows * columns // 32 * 34, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor_info(name, (columns,), np.dtype(np.float32), 4 * columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, rows, columns in tensors:
        writer.write_tensor_data(_q8_0(rng, rows, columns) if rows else np.ones(columns, np.float32))
    writer.close()


def _tensors(shape: Shape, n_vocab: int) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of each matrix; no rows where it is a vector."""
    n, q, kv = shape.n_embd, shape.head * shape.n_head, shape.head * shape.n_head_kv
    norms = {"attn_norm": n, "ffn_norm": n}
    if shape.family in ("qwen3", "gemma3"):
        norms |= {"attn_q_norm": shape.head, "attn_k_norm": shape.head}
    if shape.family == "gemma3":
        norms |= {"post_attention_norm": n, "post_ffw_norm": n}
    yield "token_embd.weight", n_vocab, n
    yield "output_norm.weight", 0, n
    for i in range(shape.n_layer):
        block = f"blk.{i}."
        for name, size in norms.items():
            yield f"{block}{name}.weight", 0, size
        yield f"{block}attn_q.weight", q, n
        yield f"{block}attn_k.weight", kv, n
        yield f"{block}attn_v.weight", kv, n
        yield f"{block}attn_output.weight", n, q
        yield f"{block}ffn_gate.weight", shape.n_ff, n
        yield f"{block}ffn_up.weight", shape.n_ff, n
        yield f"{block}ffn_down.weight", n, shape.n_ff


def _q8_0(rng: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Blocks of 32 weights: a half precision scale, then the weights as bytes; uint8 [rows, columns / 32 * 34]."""
    blocks = np.empty((rows, columns // 32, 34), np.uint8)
    scale = np.float16(1.0 / (73 * np.sqrt(columns)))
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    blocks[..., 2:] = rng.integers(0, 256, (rows, columns // 32, 32), np.uint8)
    return blocks.reshape(rows, -1)
