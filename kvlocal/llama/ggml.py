"""ggml's own functions, and what its devices can do, which can be asked before there is a model."""

from __future__ import annotations

import functools
from typing import Any

import cffi

from kvlocal.llama.cells import Layout
from kvlocal.llama.context import KV_TYPES
from kvlocal.llama.library import load
from kvlocal.llama.rows import RowTypes

# libllama links ggml, so these are found through its handle
_DECLARATIONS = """
typedef struct ggml_backend_device * ggml_backend_dev_t;
typedef struct ggml_backend_reg * ggml_backend_reg_t;
struct ggml_context;
struct ggml_tensor;
struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
size_t ggml_backend_reg_count(void);
ggml_backend_reg_t ggml_backend_reg_get(size_t index);
const char * ggml_backend_reg_name(ggml_backend_reg_t reg);
size_t ggml_backend_dev_count(void);
ggml_backend_dev_t ggml_backend_dev_get(size_t index);
ggml_backend_reg_t ggml_backend_dev_backend_reg(ggml_backend_dev_t device);
const char * ggml_backend_dev_name(ggml_backend_dev_t device);
const char * ggml_backend_dev_description(ggml_backend_dev_t device);
int ggml_backend_dev_type(ggml_backend_dev_t device);
void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total);
bool ggml_backend_dev_supports_op(ggml_backend_dev_t device, const struct ggml_tensor * op);
int64_t ggml_blck_size(int type);
size_t ggml_row_size(int type, int64_t n);
size_t ggml_tensor_overhead(void);
struct ggml_context * ggml_init(struct ggml_init_params params);
void ggml_free(struct ggml_context * ctx);
struct ggml_tensor * ggml_new_tensor_2d(struct ggml_context * ctx, int type, int64_t ne0, int64_t ne1);
struct ggml_tensor * ggml_new_tensor_3d(struct ggml_context * ctx, int type, int64_t ne0, int64_t ne1, int64_t ne2);
struct ggml_tensor * ggml_flash_attn_ext(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k, struct ggml_tensor * v,
    struct ggml_tensor * mask, float scale, float max_bias, float logit_softcap);
"""
_NOT_QUANTISED = {"f32", "f16"}
# heads, and numbers of a head, that are taken for possible
_MOST = 2**16
DEVICE_KINDS = ("cpu", "gpu", "integrated gpu", "accelerator", "meta")  # enum ggml_backend_dev_type


@functools.cache
def functions() -> tuple[cffi.FFI, Any]:
    """Of the loaded library: cffi in ABI mode, and the functions by their names in ggml."""
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    return ffi, ffi.dlopen(load().llama_cpp.llama_cpp._lib._name)


def row_types(kind: str, layout: Layout) -> RowTypes:
    """Rows of keys and values of one type, of KV_TYPES, for the heads of a cache.

    Raises:
        ValueError: their heads are no whole blocks of it.
    """
    _, ggml = functions()
    number, sizes = getattr(load().llama_cpp, KV_TYPES[kind]), (layout.n_embd_head_k, layout.n_embd_head_v)
    if any(size % ggml.ggml_blck_size(number) for size in sizes):
        raise ValueError(f"heads of {sizes[0]} and {sizes[1]} numbers are no whole blocks of {kind}")
    return RowTypes(number, number, *(ggml.ggml_row_size(number, size) for size in sizes))


def device_without_attention(
    type_k: str, type_v: str, *, n_head: int, n_head_kv: int, size_k: int, size_v: int, n_gpu_layers: int
) -> str | None:
    """The name of a device that would hold a part of a cache of these types and has no attention for it; None if there is none.

    As kvl_find_cache asks, once there is a cache. Caches that are not quantised are taken everywhere.

    type_k, type_v: of KV_TYPES
    n_head, n_head_kv, size_k, size_v: query heads, KV heads, and numbers of a key and a value of one head
    n_gpu_layers: as for Model
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
        for device in _devices(n_gpu_layers):
            if not ggml.ggml_backend_dev_supports_op(device, attention):
                return ffi.string(ggml.ggml_backend_dev_name(device)).decode("utf-8", "replace")
    finally:
        ggml.ggml_free(context)
    return None


def _devices(n_gpu_layers: int) -> list[Any]:
    """Those that llama.cpp would give layers: GPUs, an integrated one where there is no other, and the CPU."""
    _, ggml = functions()
    by_kind: dict[str, list[Any]] = {kind: [] for kind in DEVICE_KINDS}
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        by_kind.setdefault(DEVICE_KINDS[ggml.ggml_backend_dev_type(device)], []).append(device)
    gpus = (by_kind["gpu"] or by_kind["integrated gpu"][:1]) if n_gpu_layers else []
    # with -1 all layers go there
    return gpus if gpus and n_gpu_layers < 0 else gpus + by_kind["cpu"]
