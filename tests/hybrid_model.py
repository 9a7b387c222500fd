"""A GGUF with random weights, recurrent layers beside two with attention, and the vocabulary and the chat template of another file."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf_copy import Source, copy

N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD = 128, 192, 4, 2, 32
N_CONV, N_STATE, N_GROUP, N_SSM_HEAD = 4, 16, 1, 8  # of Mamba2's layers
N_DELTA, N_KEYS, N_VALUES = 32, 2, 4  # of a gated delta net: numbers of a head, heads of keys and of values
N_EXPERT = 2
# KV heads of each layer: where there are none, it is recurrent
LAYERS = [0, N_HEAD_KV, 0, 0, N_HEAD_KV, 0]


def write_hybrid_model(vocabulary: Path, target: Path, family: str = "lfm2", *, n_ctx_train: int = 2048, seed: int = 0) -> None:
    """Writes it in float32.

    family: "lfm2", whose recurrent layers are short convolutions, "granitehybrid", whose are Mamba2, "qwen3next", whose are gated delta nets, or
        "mamba2", which has no others
    """
    source, rng, tensors = Source(vocabulary), np.random.default_rng(seed), []

    def add(name: str, *shape: int, mean: float = 0.0, deviation: float | None = None) -> None:
        if deviation is None:
            deviation = 0.2 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
        values = (mean + deviation * rng.standard_normal(shape)).astype(np.float32)
        tensors.append((name, values, GGMLQuantizationType.F32, shape))

    n_vocab = len(list(source.strings("tokenizer.ggml.tokens")))
    add("token_embd.weight", n_vocab, N_EMBD)
    add("token_embd_norm.weight" if family == "lfm2" else "output_norm.weight", N_EMBD, mean=1.0)
    layers = [0] * len(LAYERS) if family == "mamba2" else LAYERS
    for i, n_head_kv in enumerate(layers):
        _add_attention(add, family, i) if n_head_kv else _add_recurrent(add, family, i)
        add(f"blk.{i}.attn_norm.weight", N_EMBD, mean=1.0)
        if family == "mamba2":
            continue
        if family == "qwen3next":
            _add_experts(add, i)
            continue
        add(f"blk.{i}.ffn_norm.weight", N_EMBD, mean=1.0)
        for name, shape in {"ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}.items():
            add(f"blk.{i}.{name}.weight", *shape)
    added = {
        "context_length": n_ctx_train, "embedding_length": N_EMBD, "block_count": len(LAYERS), "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD, "attention.head_count_kv": layers, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD, "vocab_size": n_vocab,
    }  # fmt: skip
    if family == "lfm2":
        added |= {"shortconv.l_cache": 3}
    elif family == "qwen3next":
        added |= {"ssm.conv_kernel": N_CONV, "ssm.inner_size": N_VALUES * N_DELTA, "ssm.state_size": N_DELTA, "ssm.time_step_rank": N_VALUES,
                  "ssm.group_count": N_KEYS, "attention.head_count_kv": N_HEAD_KV, "attention.recurrent_layers": [int(not n) for n in layers],
                  "expert_count": N_EXPERT, "expert_used_count": 1, "expert_feed_forward_length": N_FF, "expert_shared_feed_forward_length": N_FF,
                  "attention.key_length": HEAD, "attention.value_length": HEAD}  # fmt: skip
    else:
        added |= {"ssm.conv_kernel": N_CONV, "ssm.inner_size": 2 * N_EMBD, "ssm.state_size": N_STATE, "ssm.time_step_rank": N_SSM_HEAD,
                  "ssm.group_count": N_GROUP}  # fmt: skip
    own = f"{source.metadata['general.architecture']}."
    copy(
        source, target, metadata={"general.architecture": family}, added={f"{family}.{key}": value for key, value in added.items()},
        without=own, tensors=tensors,
    )  # fmt: skip


def _add_attention(add, family: str, i: int) -> None:
    n_query = 2 if family == "qwen3next" else 1  # with a gate behind the queries
    sizes = {"attn_q": (n_query * N_HEAD * HEAD, N_EMBD), "attn_k": (N_HEAD_KV * HEAD, N_EMBD), "attn_v": (N_HEAD_KV * HEAD, N_EMBD)}
    for name, shape in (sizes | {"attn_output": (N_EMBD, N_HEAD * HEAD)}).items():
        add(f"blk.{i}.{name}.weight", *shape)
    for name in ("attn_q_norm", "attn_k_norm") if family in ("lfm2", "qwen3next") else ():
        add(f"blk.{i}.{name}.weight", HEAD, mean=1.0)


def _add_recurrent(add, family: str, i: int) -> None:
    if family == "lfm2":
        add(f"blk.{i}.shortconv.conv.weight", N_EMBD, 3)
        add(f"blk.{i}.shortconv.in_proj.weight", 3 * N_EMBD, N_EMBD)
        add(f"blk.{i}.shortconv.out_proj.weight", N_EMBD, N_EMBD)
        return
    if family == "qwen3next":
        n_keys, n_values = N_KEYS * N_DELTA, N_VALUES * N_DELTA
        shapes = {"attn_qkv": (2 * n_keys + n_values, N_EMBD), "attn_gate": (n_values, N_EMBD), "ssm_conv1d": (2 * n_keys + n_values, N_CONV),
                  "ssm_ba": (2 * N_VALUES, N_EMBD), "ssm_out": (N_EMBD, n_values)}  # fmt: skip
        for name, shape in shapes.items():
            add(f"blk.{i}.{name}.weight", *shape)
        add(f"blk.{i}.ssm_norm.weight", N_DELTA, mean=1.0)
        add(f"blk.{i}.ssm_dt.bias", N_VALUES)
        add(f"blk.{i}.ssm_a", N_VALUES, mean=-0.05, deviation=0.01)
        return
    n_inner = 2 * N_EMBD
    n_conv = n_inner + 2 * N_GROUP * N_STATE
    add(f"blk.{i}.ssm_in.weight", 2 * n_inner + 2 * N_GROUP * N_STATE + N_SSM_HEAD, N_EMBD)
    add(f"blk.{i}.ssm_conv1d.weight", n_conv, N_CONV)
    add(f"blk.{i}.ssm_conv1d.bias", n_conv)
    add(f"blk.{i}.ssm_dt.bias", N_SSM_HEAD)
    # decays slowly, so that the state remembers
    add(f"blk.{i}.ssm_a", N_SSM_HEAD, 1, mean=-0.05, deviation=0.01)
    add(f"blk.{i}.ssm_d", N_SSM_HEAD, 1, deviation=0.5)
    add(f"blk.{i}.ssm_norm.weight", N_GROUP, n_inner // N_GROUP, mean=1.0, deviation=0.2)
    add(f"blk.{i}.ssm_out.weight", N_EMBD, n_inner)


def _add_experts(add, i: int) -> None:
    add(f"blk.{i}.post_attention_norm.weight", N_EMBD, mean=1.0)
    add(f"blk.{i}.ffn_gate_inp.weight", N_EXPERT, N_EMBD)
    add(f"blk.{i}.ffn_gate_inp_shexp.weight", N_EMBD)
    for name, shape in {"ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}.items():
        add(f"blk.{i}.{name}_exps.weight", N_EXPERT, *shape)
        add(f"blk.{i}.{name}_shexp.weight", *shape)
