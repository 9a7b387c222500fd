// Shared between kvlocal's own sources: access to llama.cpp's private parts, the ring, and how graphs are run.

#pragma once

#include "kvlocal-hooks.h"
#include "kvlocal.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

// an error that becomes a return code and a message at the C boundary
struct kvl_error : std::runtime_error {
    kvl_error(kvl_status status, const std::string & message) : std::runtime_error(message), status(status) {}

    kvl_status status;
};

struct kvl_cpu_kernels;

struct kvl_ring {
    struct layer {
        ggml_tensor * q = nullptr; // F32 [n_embd_head_k*n_head, n_window*n_seq + 1], the last row takes what is not kept

        // noted when the graph is built
        ggml_tensor * sinks    = nullptr;
        float         kq_scale = 0.0f;
        bool          has_bias = false;
    };

    int32_t n_window = 0;
    int32_t n_seq    = 0;

    // layers whose queries are stored by one node, see kvl_ring_build_write
    struct group {
        static constexpr int32_t SIZE = GGML_MAX_SRC - 2; // a custom operation takes one source less than others, and one is the rows

        const kvl_ring * ring;

        std::vector<int32_t>       layers;  // indices
        std::vector<ggml_tensor *> queries; // while a graph is built
    };

    std::vector<layer>     layers; // same order as in the KV cache
    std::vector<group>     groups; // empty where every layer has a node of its own
    std::vector<llama_pos> pos;    // [n_seq*n_window] position of the query in each row, -1 for none

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    // queries are found by their position, so rows that were overtaken or removed are never taken for valid ones
    int64_t row(llama_seq_id seq_id, llama_pos p) const { return (int64_t) seq_id*n_window + p%n_window; }
};

// the KV cache that kvlocal works on and where one sequence sits in it
struct kvl_cache {
    llama_context  * lctx;
    llama_kv_cache * kv;
    llama_kv_cache * swa; // the sliding-window cache beside it, or nullptr

    llama_memory_recurrent * recr; // the states of the recurrent layers, or nullptr

    int32_t n_layer;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_embd_head_k;
    int32_t n_embd_head_v;
    int32_t n_embd_row_v; // of that what is stored: 0 with latent attention, where a value is the beginning of its key
};

// the only door to private members
struct kvl_access {
    using kv_layer = llama_kv_cache::kv_layer;

    static const llama_hparams & hparams(const llama_kv_cache & kv) { return kv.hparams; }

    static const std::vector<kv_layer> & layers  (const llama_kv_cache & kv) { return kv.layers; }
    static bool                          v_trans (const llama_kv_cache & kv) { return kv.v_trans; }
    static bool                          is_shared(const llama_kv_cache & kv) { return kv.other != nullptr; }
    static int32_t                       layer_of(const llama_kv_cache & kv, int il) { return kv.map_layer_ids.at(il); }
    static llama_kv_cells &              cells   (llama_kv_cache & kv, llama_seq_id s) { return kv.v_cells[kv.seq_to_stream[s]]; }
    static uint32_t &                    head    (llama_kv_cache & kv, llama_seq_id s) { return kv.v_heads[kv.seq_to_stream[s]]; }
    static std::shared_ptr<kvl_ring> &   ring    (llama_kv_cache & kv) { return kv.ring; }

    static llama_kv_cache * kv_of(const llama_kv_cache_context & mctx) { return mctx.kv; }

    static std::shared_ptr<kvl_runtime> & runtime(llama_context & lctx) { return lctx.kvl; }

    static const std::vector<ggml_backend_t> &             backends(const llama_context & lctx) { return lctx.backend_ptrs; }
    static const std::vector<ggml_backend_buffer_type_t> & bufts   (const llama_context & lctx) { return lctx.backend_buft; }

    static void set_n_threads(llama_context & lctx, int32_t n_threads) {
        for (const auto & [backend, fn] : lctx.set_n_threads_fns) {
            fn(backend, n_threads);
        }
    }

    static llama_cparams & cparams(llama_context & lctx) { return lctx.cparams; }

    static void reserve_again(llama_context & lctx) { lctx.sched_need_reserve = true; }
};

// a graph over the KV cache, run on a scheduler of kvlocal's own, so that the decode graph stays warm
struct kvl_graph {
    kvl_graph(const kvl_cache & cache, size_t n_nodes);

    ggml_context * ctx() const { return ctx_ptr.get(); }

    // a tensor the caller fills before the graph runs
    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1);

    // a result that a custom operation on the CPU computes from what userdata points to: F32 [ne0, ne1, ne2]
    ggml_tensor * cpu_op(int64_t ne0, int64_t ne1, int64_t ne2, ggml_custom_op_t op, void * userdata);

    // mark as result and add to the graph
    void output(ggml_tensor * t);
    void expand(ggml_tensor * t) { ggml_build_forward_expand(gf, t); }

    // allocate, let the caller set the inputs, compute, wait
    void run(const std::function<void()> & set_inputs);

private:
    const kvl_cache & cache;
    size_t            n_nodes;
    ggml_context_ptr  ctx_ptr;
    ggml_cgraph     * gf;
};

// the compressible cache of a context, or a kvl_error that says why there is none
kvl_cache kvl_find_cache(llama_context * lctx);

// of the values of a layer, stored or as parts of its keys
ggml_type kvl_type_v(const kvl_access::kv_layer & layer);

// whether cells and rows can be of this ggml_type
bool kvl_is_cache_type(int32_t type);

// custom operations, which save most of the passes over memory, run on the CPU only
bool kvl_is_on_cpu(const kvl_cache & cache);
bool kvl_is_on_cpu(const ggml_tensor * t);

// kvlocal's own code in the ggml-cpu that computes, see kvlocal-cpu.h; nullptr, or an error, where that is one without it
const kvl_cpu_kernels * kvl_find_kernels();
const kvl_cpu_kernels & kvl_kernels();

// an error if one of them was lost; after what was computed has been read, as that is when it shows
void kvl_check_devices(const llama_context & lctx);

void kvl_check_seq  (const kvl_cache & cache, int32_t seq_id);
void kvl_check_shape(const kvl_cache & cache, int32_t seq_id, int32_t n_layer, int32_t n_head_kv, int32_t n_cells, bool may_be_empty = false);

// positions of the recorded queries that still belong to the sequence's end, ascending
std::vector<llama_pos> kvl_valid_queries(const kvl_cache & cache, int32_t seq_id);

// the last n_query of them, 0 for all; an error if there are not so many
std::vector<llama_pos> kvl_select_queries(const kvl_cache & cache, int32_t seq_id, int32_t n_query);

// all that the ring holds of one sequence, as bytes
size_t kvl_ring_state_size(const kvl_ring & ring);
void   kvl_ring_get_state (const kvl_ring & ring, int32_t seq_id, uint8_t * state);
void   kvl_ring_set_state (kvl_ring & ring, int32_t seq_id, const uint8_t * state);

// the used cells of a sequence by ascending position
std::vector<int32_t> kvl_cells_by_position(const kvl_cache & cache, int32_t seq_id);

// the Hadamard matrix that stored keys are multiplied by, to be filled by set_input_k_rot; nullptr without one
ggml_tensor * kvl_build_k_rot(const kvl_cache & cache, ggml_context * ctx);

// 3-d view of one stream's keys or values: [n_embd_head, n_cells, n_head_kv]
ggml_tensor * kvl_view_heads(ggml_context * ctx, ggml_tensor * stream, int64_t n_embd_head, int64_t n_head_kv, int64_t n_cells);

// memory of a device for what a graph is given; the next graph that asks has it, larger if need be
ggml_backend_buffer_t kvl_input_buffer(llama_context & lctx, ggml_backend_buffer_type_t buft, size_t size);

// whether the passes of kvlocal-cpu.h, which know neither soft caps nor sinks, give the attention of every layer
bool kvl_is_plain_attention(const kvl_cache & cache);

// rotate keys or queries of layer il by delta positions more, x: F32 [n_embd_head_k, n], delta: I32 [n], or [1] where it is the same for all
// hadamard: what build_input_k_rot gave
ggml_tensor * kvl_build_rotate(const kvl_cache & cache, ggml_context * ctx, ggml_tensor * x, ggml_tensor * delta, ggml_tensor * hadamard, uint32_t il);

// keys of a conversation in host memory, checked
struct kvl_host_keys {
    const uint8_t * const * chunks; // each [n_layer, n_head_kv, chunk_size, row size]
    const int32_t * starts;         // [n_stretch] the first key of each stretch
    const int32_t * shifts;         // [n_stretch] by how many positions its keys are to be rotated

    ggml_type type;

    int32_t chunk_size;
    int32_t n_rows;
    int32_t n_stretch;
};

// the recorded queries of all layers in host memory: rotating the few queries back has the effect of rotating the many keys
struct kvl_queries {
    std::vector<int32_t> shifts; // of each copy, the first is 0
    std::vector<float>   data;   // [n_layer, n_copy, n_query, n_embd_q]
    std::vector<float>   scales; // [n_layer] of their products with keys
    std::vector<int32_t> before; // [n_query] by how many tokens each is older than the last one

    int64_t n_query;
    int64_t n_embd_q;

    int32_t n_layer;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_embd_head_k;
    int32_t n_threads;

    const float * layer(int64_t i) const { return data.data() + i*shifts.size()*n_query*n_embd_q; }
};

void kvl_scores       (const kvl_cache & cache, int32_t seq_id, int32_t n_query, bool portable, bool largest, float * scores, int32_t n_cells);
void kvl_attention_map(const kvl_cache & cache, int32_t seq_id, int32_t n_query, const int32_t * layers, int32_t n_chosen, float * map, int32_t n_cells);
kvl_queries kvl_copy_queries(const kvl_cache & cache, int32_t seq_id, int32_t n_query, int32_t every, const int32_t * shifts, int32_t n_shift);
void        kvl_row_scores  (const kvl_queries & queries, bool largest, const kvl_host_keys & keys, float * scores);

// which of them are looked at, checked
struct kvl_search {
    const uint16_t * const * boxes; // [n_chunk], see kvl_get_boxes

    int32_t n_bound;
    int32_t first;
    int32_t last;
    int32_t n_block;
    int32_t n_best;
};

void kvl_best_rows    (const kvl_queries & queries, const kvl_host_keys & keys, const kvl_search & search, int32_t * rows, float * scores);
void kvl_boxes        (const kvl_cache & cache, const uint8_t * keys, ggml_type type, int32_t chunk_size, int32_t first_block, int32_t n_block, uint16_t * boxes);
void kvl_redundancy   (const kvl_cache & cache, int32_t seq_id, bool portable, float * redundancy, int32_t n_cells);

// what kvl_compact is asked for, checked
struct kvl_compaction {
    const int32_t * gather; // [n_layer, n_head_kv, n_keep]
    const int32_t * pos;    // [n_keep]
    const int32_t * delta;  // [n_layer, n_head_kv, n_keep] or nullptr
    const kvl_rows * rows;  // or nullptr

    int32_t n_keep;
    bool    portable;
};

void kvl_compact_cells(const kvl_cache & cache, int32_t seq_id, const kvl_compaction & what);

// bytes of a stored key and value of one head
size_t kvl_row_size_k(const kvl_cache & cache);
size_t kvl_row_size_v(const kvl_cache & cache);

// the same of n numbers of a type that rows in host memory may have; an error if they may not, or if these are no whole blocks of it
size_t kvl_row_size(int32_t type, int64_t n);

// rows of n numbers from one type to another: as they are where the types are the same, else by way of float32 and ggml's own rounding
struct kvl_row_conversion {
    kvl_row_conversion(ggml_type from, ggml_type to, int64_t n);

    void operator()(const void * src, void * dst);

private:
    ggml_type from;
    ggml_type to;
    size_t    size; // bytes of the latter

    std::vector<float> numbers;
};

void kvl_check_rows(const kvl_cache & cache, const kvl_rows & rows);
void kvl_read_cells(const kvl_cache & cache, int32_t seq_id, const int32_t * cells, const kvl_rows & rows);

// throws what is wrong with a grammar
void kvl_check_grammar(const llama_vocab * vocab, const std::string & text);
