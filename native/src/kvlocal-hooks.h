// What the patched files of llama.cpp see of kvlocal: the query ring and the attention of single tokens.

#pragma once

#include <cstdint>
#include <memory>

struct ggml_context;
struct ggml_cgraph;
struct ggml_tensor;

struct llama_cparams;
struct llama_hparams;
struct llama_ubatch;
class  llama_kv_cache_context;
class  llm_graph_result;

struct kvl_access;  // reads and writes the private parts of the caches and of the context
struct kvl_ring;    // the query ring of one KV cache
struct kvl_runtime; // the scheduler of kvlocal's own graphs

// the input that says which ring row each query of the batch goes to; nullptr while the ring is off
ggml_tensor * kvl_ring_build_input(
                    ggml_context * ctx,
    const llama_kv_cache_context * mctx,
              const llama_ubatch & ubatch);

// store the queries of a layer, q_cur: [n_embd_head_k, n_head, n_tokens], as attention uses them
// kq_b, sinks and kq_scale are noted: the scores have to repeat this layer's attention
void kvl_ring_build_write(
                    ggml_context * ctx,
                     ggml_cgraph * gf,
    const llama_kv_cache_context * mctx,
                     ggml_tensor * idxs,
                     ggml_tensor * q_cur,
                     ggml_tensor * kq_b,
                     ggml_tensor * sinks,
                           float   kq_scale,
                             int   il);

void kvl_ring_set_input(
    const llama_kv_cache_context * mctx,
                     ggml_tensor * idxs,
              const llama_ubatch * ubatch);

// forget the recorded queries of a sequence (-1: of all)
void kvl_ring_invalidate(kvl_ring * ring, int32_t seq_id);

// attention of a few tokens to a half precision cache on the CPU, as ggml_flash_attn_ext returns it
// q, k, v: permuted as that one wants them; nullptr where only that one will do
ggml_tensor * kvl_attention(
                    ggml_context * ctx,
                llm_graph_result * res,
             const llama_hparams & hparams,
             const llama_cparams & cparams,
                     ggml_tensor * q,
                     ggml_tensor * k,
                     ggml_tensor * v,
                     ggml_tensor * kq_mask,
                     ggml_tensor * sinks,
                     ggml_tensor * v_mla,
                           float   kq_scale);
