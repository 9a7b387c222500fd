"""A compact PyTorch decoder of the llama, qwen2, qwen3 and gemma3 families, in which each row says what it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlocal.training.weights import Weights

_ALIGNMENT = 8  # head sizes that attention kernels like


@dataclass(frozen=True)
class LowRankAdapter:
    """A low-rank addition to the linear layers, for some rows only.

    pairs: by GGUF's tensor name, A [r, n_in] and B [n_out, r] in the compute type; they may have gradients
    scale: the addition is scale * B A x, alpha / r in llama.cpp
    rows: int64 [n], which rows get it; None for all
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    rows: Tensor | None = None


@dataclass(frozen=True)
class Cells:
    """Rotated keys and values of one layer, each [H_kv, C, d]."""

    keys: Tensor
    values: Tensor

    def first(self, n: int) -> Cells:
        return Cells(self.keys[:, :n], self.values[:, :n])


# What the heads of layer i read, [T, H * d] in the compute type, from its queries [H_kv, G, T, d] and the rows' own cells.
Attention = Callable[[int, Tensor, Cells], Tensor]


@dataclass(frozen=True)
class Pass:
    """What a forward pass gives for its T rows, over C columns: the cells before them, then their own.

    hidden: float32 [T, n_embd], behind the last norm
    cells: of each layer, all C of them
    masses: [L, H, T, S] in the compute type, the softmax weight on each column set, or None
    watched: float32 [L, H_kv, n, C], the softmax weights of the watched rows, maximum over a group's query heads, or None
    """

    hidden: Tensor
    cells: list[Cells]
    masses: Tensor | None
    watched: Tensor | None


class Decoder:
    """Forward passes over rows that may be tokens or vectors, with any visibility."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.hyper = weights.hyper
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of tokens int64 [T], float32 [T, n_embd], scaled as the model wants them."""
        return self.weights.embedding[tokens].float() * self.hyper.embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of rows [T, n_embd], [T, n_vocab] in the compute type."""
        return self.cap(F.linear(hidden.to(self.dtype), self.weights.output))

    def cap(self, logits: Tensor) -> Tensor:
        softcap = self.hyper.softcap
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        visible: Tensor,
        *,
        past: list[Cells] | None = None,
        past_positions: Tensor | None = None,
        adapter: LowRankAdapter | None = None,
        columns: Tensor | None = None,
        watch: Tensor | None = None,
    ) -> Pass:
        """Runs rows through all layers.

        Args:
            x: float32 [T, n_embd].
            positions: int64 [T].
            visible: bool [L or 1, H_kv or 1, T, C], which columns each row sees; layers with a sliding window see no further than that.
            past: of each layer, cells in front of the rows' own.
            past_positions: int64 [C - T], theirs.
            adapter: what some rows get on top of the weights.
            columns: [L or 1, H_kv or 1, C, S], sets of columns, as ones and zeros; `Pass.masses` says what each row pays to them.
            watch: int64 [n], rows whose attention `Pass.watched` gives.
        """
        all_positions = positions if past_positions is None else torch.cat([past_positions, positions])
        masks = Masks(visible, positions, all_positions, self.dtype)
        cells, masses, watched = [], [], []

        def attention(i: int, q: Tensor, own: Cells) -> Tensor:
            here = own if past is None else Cells(torch.cat([past[i].keys, own.keys], 1), torch.cat([past[i].values, own.values], 1))
            mask = masks.of(i, self.hyper.windows[i])
            heads, mass = self._attend(q, here, mask, None if columns is None else columns[min(i, len(columns) - 1)])
            cells.append(here)
            if mass is not None:
                masses.append(mass)
            if watch is not None:
                watched.append(self.attention_weights(q[:, :, watch], here.keys, mask[:, :, watch]))
            return heads

        return Pass(
            self.through_layers(x, positions, attention, adapter),
            cells,
            torch.stack(masses) if masses else None,
            torch.stack(watched) if watched else None,
        )

    def through_layers(self, x: Tensor, positions: Tensor, attention: Attention, adapter: LowRankAdapter | None = None) -> Tensor:
        """Runs rows through all layers, whose heads read what `attention` gives: float32 [T, n_embd] behind the last norm.

        Args:
            x: float32 [T, n_embd].
            positions: int64 [T], which queries and keys are rotated to.
            attention: called once for each layer, from the first on.
            adapter: what some rows get on top of the weights.
        """
        rotations = self._rotations(positions)
        for i, layer in enumerate(self.weights.layers):
            q, own = self._project(i, layer, self._norm(x, layer["attn_norm.weight"]), rotations[self._rope(i)], adapter)
            out = self._linear(i, layer, "attn_output", attention(i, q, own), adapter).float()
            if "post_attention_norm.weight" in layer:
                out = self._norm(out, layer["post_attention_norm.weight"])
            x = x + out
            out = self._feed_forward(i, layer, self._norm(x, layer["ffn_norm.weight"]), adapter).float()
            if "post_ffw_norm.weight" in layer:
                out = self._norm(out, layer["post_ffw_norm.weight"])
            x = x + out
        return self._norm(x, self.weights.output_norm)

    def read(self, q: Tensor, cells: Cells, mask: Tensor) -> Tensor:
        """What heads read from cells, [T, H * d]: queries [H_kv, G, T, d], mask [H_kv or 1, 1, T, C] that is added to their scores."""
        return self._attend(q, cells, mask, None)[0]

    def moved_keys(self, i: int, keys: Tensor, by: Tensor) -> Tensor:
        """Keys of layer i [H_kv, n, d] as if each had been read at a position that is higher by so much, int64 [H_kv, n]."""
        cosines, sines = (part.view(*by.shape, -1) for part in self._rotation(by.flatten(), *self._rope(i)))
        return self._rotate(keys, (cosines, sines)).to(keys.dtype)

    def moved(self, cells: list[Cells], by: Tensor) -> list[Cells]:
        """Cells of each layer as if each had been read at a position that is higher by so much, int64 [C]."""
        rotations = self._rotations(by)
        return [
            Cells(self._rotate(layer.keys.transpose(0, 1), rotations[self._rope(i)]).to(layer.keys.dtype).transpose(0, 1), layer.values)
            for i, layer in enumerate(cells)
        ]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.hyper.eps)

    def _linear(self, i: int, layer: dict[str, Tensor], name: str, x: Tensor, adapter: LowRankAdapter | None) -> Tensor:
        x = x.to(self.dtype)
        bias = layer.get(name + ".bias")
        y = F.linear(x, layer[name + ".weight"], None if bias is None else bias.to(self.dtype))
        pair = adapter.pairs.get(f"blk.{i}.{name}.weight") if adapter else None
        if adapter is None or pair is None:
            return y
        a, b = pair
        if adapter.rows is None:
            return y.add(F.linear(F.linear(x, a), b), alpha=adapter.scale)
        return y.index_add_(0, adapter.rows, F.linear(F.linear(x.index_select(0, adapter.rows), a), b), alpha=adapter.scale)

    def _project(
        self, i: int, layer: dict[str, Tensor], x: Tensor, rotation: tuple[Tensor, Tensor], adapter: LowRankAdapter | None
    ) -> tuple[Tensor, Cells]:
        """Queries [H_kv, G, T, d], and the rows' own cells."""
        hyper = self.hyper
        x = x.to(self.dtype)
        q, k, v = (self._linear(i, layer, name, x, adapter) for name in ("attn_q", "attn_k", "attn_v"))
        q = q.view(len(x), hyper.n_head, hyper.n_embd_head)
        k, v = (part.view(len(x), hyper.n_head_kv, hyper.n_embd_head) for part in (k, v))
        if "attn_q_norm.weight" in layer:
            q, k = self._norm(q.float(), layer["attn_q_norm.weight"]), self._norm(k.float(), layer["attn_k_norm.weight"])
        q, k = (self._rotate(part, rotation).to(self.dtype).transpose(0, 1) for part in (q, k))
        return q.unflatten(0, (hyper.n_head_kv, -1)), Cells(k, v.transpose(0, 1))

    def _rope(self, i: int) -> tuple[float, float]:
        return self.hyper.rope_bases[i], self.hyper.rope_scales[i]

    def _rotations(self, positions: Tensor) -> dict[tuple[float, float], tuple[Tensor, Tensor]]:
        """By base and scale of a layer."""
        return {key: self._rotation(positions, *key) for key in set(map(self._rope, range(self.hyper.n_layer)))}

    def _rotation(self, positions: Tensor, base: float, scale: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [T, 1, d / 2]."""
        half = self.hyper.n_embd_head // 2
        frequencies = base ** (-torch.arange(half, device=self.device, dtype=torch.float64) / half)
        if self.weights.rope_factors is not None:
            frequencies = frequencies / self.weights.rope_factors
        angles = (positions[:, None].double() * scale * frequencies)[:, None]
        return angles.cos().float(), angles.sin().float()

    def _rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        cosines, sines = rotation
        if self.hyper.rope_neighbours:
            even, odd = x[..., ::2], x[..., 1::2]
            return torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cosines - second * sines, first * sines + second * cosines], -1)

    def _attend(self, q: Tensor, cells: Cells, mask: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What all heads read, [T, H * d], and their masses [H, T, S] on the column sets [H_kv or 1, C, S]."""
        n_head_kv, n_group, _, size = q.shape
        keys, values = cells.keys, cells.values
        if columns is not None:
            # a softmax weight on a set is one more number of the values, so no weights need to be kept
            n_extra = -(-columns.shape[-1] // _ALIGNMENT) * _ALIGNMENT
            values = torch.cat([values, F.pad(columns.to(self.dtype), (0, n_extra - columns.shape[-1])).expand(n_head_kv, -1, -1)], -1)
            q, keys = F.pad(q, (0, n_extra)), F.pad(keys, (0, n_extra))
        keys, values = (part[:, None].expand(-1, n_group, -1, -1) for part in (keys, values))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.hyper.attention_scale)
        out = out.flatten(0, 1)
        mass = None if columns is None else out[..., size : size + columns.shape[-1]]
        return out[..., :size].transpose(0, 1).flatten(1), mass

    def attention_weights(self, q: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Softmax weights of a few rows' queries [H_kv, G, n, d], maximum over the group, float32 [H_kv, n, C]."""
        scores = (q @ keys[:, None].transpose(-1, -2)).float() * self.hyper.attention_scale + mask.float()
        return scores.softmax(-1).amax(1)

    def _feed_forward(self, i: int, layer: dict[str, Tensor], x: Tensor, adapter: LowRankAdapter | None) -> Tensor:
        x = x.to(self.dtype)
        gate, up = (self._linear(i, layer, name, x, adapter) for name in ("ffn_gate", "ffn_up"))
        gate = F.gelu(gate, approximate="tanh") if self.hyper.gelu else F.silu(gate)
        return self._linear(i, layer, "ffn_down", gate * up, adapter)


class Masks:
    """What each layer adds to its scores, [H_kv or 1, 1, T, C]: 0 where a row sees a column, -inf elsewhere."""

    def __init__(self, visible: Tensor, positions: Tensor, all_positions: Tensor, dtype: torch.dtype) -> None:
        self._visible, self._dtype = visible, dtype
        self._distance = positions[:, None] - all_positions
        self._made: dict[int | None, Tensor] = {}

    def of(self, i: int, window: int | None) -> Tensor:
        if len(self._visible) > 1:
            return self._make(self._visible[i], window)
        if window not in self._made:
            self._made[window] = self._make(self._visible[0], window)
        return self._made[window]

    def _make(self, visible: Tensor, window: int | None) -> Tensor:
        seen = visible if window is None else visible & (self._distance < window)
        return torch.zeros(seen.shape, dtype=self._dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None]
