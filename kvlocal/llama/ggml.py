"""ggml's own functions, which can be called before there is a model."""

from __future__ import annotations

import functools
from typing import Any

import cffi

from kvlocal.llama.library import load

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
ggml_backend_reg_t ggml_backend_reg_by_name(const char * name);
void * ggml_backend_reg_get_proc_address(ggml_backend_reg_t reg, const char * name);
size_t ggml_backend_reg_dev_count(ggml_backend_reg_t reg);
struct ggml_backend_device * ggml_backend_reg_dev_get(ggml_backend_reg_t reg, size_t index);
size_t ggml_backend_dev_count(void);
ggml_backend_dev_t ggml_backend_dev_get(size_t index);
ggml_backend_reg_t ggml_backend_dev_backend_reg(ggml_backend_dev_t device);
int ggml_backend_dev_type(ggml_backend_dev_t device);
void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total);
struct ggml_backend_dev_caps { bool async; bool host_buffer; bool buffer_from_host_ptr; bool events; bool mmap_support; };
struct ggml_backend_dev_props { const char * name; const char * description; size_t memory_free; size_t memory_total; int type;
    const char * device_id; struct ggml_backend_dev_caps caps; };
void ggml_backend_dev_get_props(ggml_backend_dev_t device, struct ggml_backend_dev_props * props);
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


@functools.cache
def functions() -> tuple[cffi.FFI, Any]:
    """Of the loaded library: cffi in ABI mode, and the functions by their names in ggml."""
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    return ffi, ffi.dlopen(load().llama_cpp.llama_cpp._lib._name)
