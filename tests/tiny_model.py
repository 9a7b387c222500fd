"""A GGUF with random weights and no vocabulary, small enough to train in a test, of any family that Nexus tokens are trained for."""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD = 256, 64, 96, 4, 2, 16
WINDOW = 24  # of gemma3's layers with a sliding window


def write_tiny_model(target: Path, family: str, *, n_layer: int = 2, tied: bool = True, seed: int = 0) -> None:
    """Writes n_layer layers of float32. Norm weights and biases are random too, so that leaving one out is noticed."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(target, family)
    writer.add_context_length(512)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    if family == "gemma3":
        writer.add_sliding_window(WINDOW)

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        deviation = 0.2 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
        writer.add_tensor(name, (mean + deviation * rng.standard_normal(shape)).astype(np.float32))

    add("token_embd.weight", N_VOCAB, N_EMBD)
    add("output_norm.weight", N_EMBD, mean=1.0)
    if not tied:
        add("output.weight", N_VOCAB, N_EMBD)
    linear = {
        "attn_q": (N_HEAD * HEAD, N_EMBD), "attn_k": (N_HEAD_KV * HEAD, N_EMBD), "attn_v": (N_HEAD_KV * HEAD, N_EMBD),
        "attn_output": (N_EMBD, N_HEAD * HEAD), "ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF),
    }  # fmt: skip
    norms = {"attn_norm": N_EMBD, "ffn_norm": N_EMBD}
    if family in ("qwen3", "gemma3"):
        norms |= {"attn_q_norm": HEAD, "attn_k_norm": HEAD}
    if family == "gemma3":
        norms |= {"post_attention_norm": N_EMBD, "post_ffw_norm": N_EMBD}
    for i in range(n_layer):
        for name, shape in linear.items():
            add(f"blk.{i}.{name}.weight", *shape)
        for name, size in norms.items():
            add(f"blk.{i}.{name}.weight", size, mean=1.0)
        for name in ("attn_q", "attn_k", "attn_v") if family == "qwen2" else ():
            add(f"blk.{i}.{name}.bias", linear[name][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
