"""Types of keys and values: rows of them, and which devices have attention for a cache of them."""

from __future__ import annotations

from kvlocal.llama.context import KV_TYPES
from kvlocal.llama.devices import Device, cpu_devices, devices_of
from kvlocal.llama.ggml import functions
from kvlocal.llama.layout import Layout
from kvlocal.llama.library import load
from kvlocal.llama.placement import Placement
from kvlocal.llama.rows import RowTypes

_NOT_QUANTISED = {"f32", "f16"}
# heads, and numbers of a head, that are taken for possible
_MOST = 2**16


def row_types(kind: str, layout: Layout) -> RowTypes:
    """Rows of keys and values of one type, of KV_TYPES, for the heads of a cache.

    Raises:
        ValueError: their heads are no whole blocks of it.
    """
    _, ggml = functions()
    number, sizes = getattr(load().llama_cpp, KV_TYPES[kind]), (layout.n_embd_head_k, layout.n_embd_row_v)
    if any(size % ggml.ggml_blck_size(number) for size in sizes):
        raise ValueError(f"heads of {sizes[0]} and {sizes[1]} numbers are no whole blocks of {kind}")
    return RowTypes(number, number, *(ggml.ggml_row_size(number, size) for size in sizes))


def device_without_attention(
    type_k: str, type_v: str, *, n_head: int, n_head_kv: int, size_k: int, size_v: int, placement: Placement
) -> str | None:
    """The name of a device that would hold a part of a cache of these types and has no attention for it; None if there is none.

    As kvl_find_cache asks, once there is a cache. Caches that are not quantised are taken everywhere.

    type_k, type_v: of KV_TYPES
    n_head, n_head_kv, size_k, size_v: query heads, KV heads, and numbers of a key and a value of one head
    placement: where the model is put

    Raises:
        EngineError: it names a device that there is not.
    """
    if {type_k, type_v} <= _NOT_QUANTISED:
        return None
    ffi, ggml = functions()
    kinds = [getattr(load().llama_cpp, KV_TYPES[name]) for name in ("f32", type_k, type_v, "f16")]
    sizes = (size_k, size_v)
    # ggml ends the process where shapes do not go together
    fit = min(n_head, n_head_kv, *sizes) > 0 and max(n_head, *sizes) < _MOST and n_head % n_head_kv == 0
    if not fit or any(size % ggml.ggml_blck_size(kind) for size, kind in zip(sizes, kinds[1:3], strict=True)):
        return None
    n_cells = 256
    context = ggml.ggml_init(ffi.new("struct ggml_init_params *", (8 * ggml.ggml_tensor_overhead(), ffi.NULL, True))[0])
    try:
        shapes = ((size_k, 1, n_head), (size_k, n_cells, n_head_kv), (size_v, n_cells, n_head_kv))
        q, k, v = (ggml.ggml_new_tensor_3d(context, kind, *shape) for kind, shape in zip(kinds, shapes, strict=False))
        mask = ggml.ggml_new_tensor_2d(context, kinds[3], n_cells, 1)
        attention = ggml.ggml_flash_attn_ext(context, q, k, v, mask, 1.0, 0.0, 0.0)
        for device in _with_attention(placement):
            if not ggml.ggml_backend_dev_supports_op(ffi.cast("ggml_backend_dev_t", device.address), attention):
                return device.name
    finally:
        ggml.ggml_free(context)
    return None


def _with_attention(placement: Placement) -> list[Device]:
    """The devices that would hold a part of the cache. With all layers elsewhere the CPU holds none."""
    chosen = devices_of(placement) if placement.kv_offload else []
    on_cpu = not chosen or placement.n_gpu_layers >= 0
    return chosen + (cpu_devices() if on_cpu else [])
