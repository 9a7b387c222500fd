"""What the recurrent layers of a model look like, from its file alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from kvlocal.gguf.container import Container

# what llama.cpp gives a plain KV cache to in the layers with attention
HYBRID_FAMILIES = frozenset(
    ("falcon-h1", "granitehybrid", "jamba", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "plamo2", "qwen35", "qwen35moe", "qwen3next")
)


@dataclass(frozen=True)
class Recurrent:
    """Layers that have a state of fixed size, in place of a cache or beside it.

    n_layer: how many
    attention_layers: those with a KV cache
    state_bytes: what the states take for one conversation, all layers together; 0 where the file does not say it in a way that is known here
    """

    n_layer: int
    attention_layers: frozenset[int]
    state_bytes: int

    @classmethod
    def of(cls, model: Container) -> Self | None:
        """None for a model without any."""
        family = model.metadata.get("general.architecture")
        parts: dict[int, set[str]] = {}
        for name in model.tensors:
            if name.startswith("blk."):
                _, layer, *part = name.split(".")
                if part and layer.isdecimal():
                    parts.setdefault(int(layer), set()).add(part[0])
        recurrent = {i for i, layer in parts.items() if any(part.startswith(("ssm_", "shortconv", "time_mix_")) for part in layer)}
        # one matrix for queries, keys and values is that of a linear attention where there are parts of a state
        attention = frozenset(i for i, layer in parts.items() if "attn_k" in layer or ("attn_qkv" in layer and i not in recurrent))
        if not recurrent:
            return None

        def number(name: str) -> int:
            value = model.metadata.get(f"{family}.{name}", 0)
            return value if isinstance(value, int) else 0

        # llama_hparams::n_embd_r and n_embd_s
        n_inner, n_state = number("ssm.inner_size"), number("ssm.state_size")
        conv = max(0, number("ssm.conv_kernel") - 1) * (n_inner + 2 * number("ssm.group_count") * n_state)
        short = number("embedding_length") * max(0, number("shortconv.l_cache") - 1)
        return cls(len(recurrent), attention, 4 * len(recurrent) * (short or conv + n_inner * n_state))
