"""What the compressible cache of a context looks like."""

from __future__ import annotations

from dataclasses import dataclass

from kvlocal.llama.rows import RowTypes

BLOCK = 16  # keys that share a box


@dataclass(frozen=True)
class Layout:
    """What the compressible cache of a context looks like; the fields of kvl_layout in kvlocal.h."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    n_seq_max: int
    n_cells_max: int
    n_window: int
    is_swa: bool
    is_recurrent: bool
    can_rotate: bool
    is_on_device: bool
    type_k: int
    type_v: int
    row_size_k: int
    row_size_v: int

    @property
    def n_embd_row_v(self) -> int:
        """Numbers of a value of one head that are stored: none with latent attention, where it is the beginning of its key."""
        return self.n_embd_head_v if self.row_size_v else 0

    @property
    def row_types(self) -> RowTypes:
        """What the cache stores its cells in."""
        return RowTypes(self.type_k, self.type_v, self.row_size_k, self.row_size_v)

    @property
    def ring_bytes(self) -> int:
        """What the recorded queries take: [n_embd_head_k * n_head, n_window * n_seq_max + 1] float32 in each layer."""
        n_rows = self.n_window * self.n_seq_max + 1 if self.n_window else 0
        return self.n_layer * self.n_head * self.n_embd_head_k * n_rows * 4
