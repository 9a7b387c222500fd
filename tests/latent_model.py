"""A GGUF with latent attention, random weights, and the vocabulary and the chat template of another file."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf_copy import Source, copy

N_EMBD, N_FF, N_HEAD, N_LAYER = 128, 192, 4, 3
LATENT, ROTATED, PLAIN, VALUE, QUERIES = 64, 32, 32, 32, 48


def write_latent_model(vocabulary: Path, target: Path, *, absorbed: bool = True, n_ctx_train: int = 2048, seed: int = 0) -> None:
    """Writes it in float32, of DeepSeek's family.

    absorbed: with the matrices for keys and values apart, so that the cache holds the latent vectors of one head; else as files were before
    """
    source, rng, tensors = Source(vocabulary), np.random.default_rng(seed), []

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        deviation = 0.2 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
        tensors.append((name, (mean + deviation * rng.standard_normal(shape)).astype(np.float32), GGMLQuantizationType.F32, shape))

    n_vocab = len(list(source.strings("tokenizer.ggml.tokens")))
    add("token_embd.weight", n_vocab, N_EMBD)
    add("output_norm.weight", N_EMBD, mean=1.0)
    add("output.weight", n_vocab, N_EMBD)
    shapes = {
        "attn_q_a": (QUERIES, N_EMBD), "attn_q_b": (N_HEAD * (PLAIN + ROTATED), QUERIES), "attn_kv_a_mqa": (LATENT + ROTATED, N_EMBD),
        "attn_output": (N_EMBD, N_HEAD * VALUE), "ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF),
    }  # fmt: skip
    if absorbed:
        shapes |= {"attn_k_b": (N_HEAD, LATENT, PLAIN), "attn_v_b": (N_HEAD, VALUE, LATENT)}
    else:
        shapes |= {"attn_kv_b": (N_HEAD * (PLAIN + VALUE), LATENT)}
    for i in range(N_LAYER):
        for name, size in {"attn_norm": N_EMBD, "attn_q_a_norm": QUERIES, "attn_kv_a_norm": LATENT, "ffn_norm": N_EMBD}.items():
            add(f"blk.{i}.{name}.weight", size, mean=1.0)
        for name, shape in shapes.items():
            add(f"blk.{i}.{name}.weight", *shape)
    added = {
        "context_length": n_ctx_train, "embedding_length": N_EMBD, "block_count": N_LAYER, "feed_forward_length": N_FF, "vocab_size": n_vocab,
        "attention.head_count": N_HEAD, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0, "rope.dimension_count": ROTATED,
        "attention.q_lora_rank": QUERIES, "attention.kv_lora_rank": LATENT, "leading_dense_block_count": N_LAYER, "expert_count": 0,
        "expert_shared_count": 0, "expert_feed_forward_length": N_FF,
    }  # fmt: skip
    if absorbed:
        added |= {"attention.head_count_kv": 1, "attention.key_length": LATENT + ROTATED, "attention.value_length": LATENT,
                  "attention.key_length_mla": PLAIN + ROTATED, "attention.value_length_mla": VALUE}  # fmt: skip
    else:
        added |= {"attention.head_count_kv": N_HEAD, "attention.key_length": PLAIN + ROTATED, "attention.value_length": VALUE}
    own = f"{source.metadata['general.architecture']}."
    copy(
        source, target, metadata={"general.architecture": "deepseek2"}, added={f"deepseek2.{key}": value for key, value in added.items()},
        without=own, tensors=tensors,
    )  # fmt: skip
