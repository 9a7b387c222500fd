// What kvlocal computes on the CPU in code of its own: scores, redundancy and attention as custom operations of a graph, and what goes with them.
//
// It is a part of ggml-cpu, so that it is compiled for the same processor: a portable build has many variants of that and takes the best one when it
// runs. libllama does not link to any of them, it asks for the functions by their table.

#pragma once

#include "ggml.h"

#include <atomic>
#include <cstdint>
#include <vector>

constexpr float KVL_SIMILAR = 0.5f; // keys with a larger cosine are twins (R-KV)

// rows of masks are padded to a multiple of this
constexpr int64_t KVL_CPU_PAD = 32;

// fast matrix products want whole vectors; the capacity of a stream is a multiple of more, and masked cells weigh nothing
inline int32_t kvl_pad_cells(int32_t n_cells) {
    return GGML_PAD(n_cells, KVL_CPU_PAD);
}

// the keys of one layer: of a stream, where the cache has them, or in chunks of the host
struct kvl_stored_keys {
    ggml_type    type;
    const char * data;
    size_t       cell_size;
    size_t       head_size;

    const uint8_t * const * chunks = nullptr; // each of chunk_size cells
    int64_t chunk_size = 1;

    // a stream
    kvl_stored_keys(const ggml_tensor * stream, int64_t n_embd_head) :
        type(stream->type),
        data((const char *) stream->data),
        cell_size(stream->nb[1]),
        head_size(ggml_row_size(stream->type, n_embd_head)) {}

    // chunks: each [n_layer, n_head_kv, chunk_size, row of type]
    kvl_stored_keys(const uint8_t * const * chunks, int64_t chunk_size, ggml_type type, int64_t n_embd_head, int64_t n_head_kv, int64_t layer) :
        type(type),
        data(nullptr),
        cell_size(ggml_row_size(type, n_embd_head)),
        head_size(chunk_size*cell_size),
        chunks(chunks),
        chunk_size(chunk_size),
        offset(layer*n_head_kv*head_size) {}

    const char * at(int64_t cell, int64_t head) const {
        if (!chunks) {
            return data + cell*cell_size + head*head_size;
        }
        return (const char *) chunks[cell/chunk_size] + offset + cell%chunk_size*cell_size + head*head_size;
    }

private:
    size_t offset = 0; // of the layer in a chunk
};

// cells that meet the same copy of the queries
struct kvl_stretch {
    int32_t start; // its first cell; it ends where the next one starts
    int32_t copy;
};

// see kvl_get_scores; dst: F32 [n_cells, n_head_kv, n_layer]
struct kvl_cpu_scores {
    std::vector<kvl_stored_keys> keys;    // per layer
    std::vector<const float *>   queries; // per layer, the ring [.., n_head, n_embd_head], or copies of the queries one after another
    std::vector<float>           scales;  // per layer
    std::vector<int32_t>         rows;    // [n_query] of the ring, or of the first copy
    std::vector<float>           mask;    // [n_query, n_mask] 0 or -inf
    int64_t n_mask;
    int64_t n_embd_head;
    int64_t n_head;
    int64_t n_head_kv;
    bool    largest; // over the queries, instead of the mean

    std::vector<kvl_stretch> stretches = { { 0, 0 } };

    static void compute(ggml_tensor * dst, int ith, int nth, void * userdata);
};

// keys of a block share a box: no key in it meets a query with more than the box allows
constexpr int64_t KVL_BLOCK = 16; // KVL_BLOCK_SIZE

// see kvl_get_best_rows; dst: F32 [n_best, n_head_kv, n_layer]
struct kvl_cpu_best_rows {
    const kvl_cpu_scores & scores; // of the chosen rows

    const ggml_fp16_t * const * boxes; // each F16 [n_layer, n_head_kv, 2, n_embd_head, n_box]
    int64_t n_box;   // of a chunk
    int64_t n_bound; // queries that meet the boxes

    int64_t n_rows;
    int64_t first;  // rows before it, and from `last` on, are chosen always
    int64_t last;
    int64_t n_block; // that are chosen between them

    int32_t * best; // [n_layer, n_head_kv, n_best]

    static void compute(ggml_tensor * dst, int ith, int nth, void * userdata);
};

// the boxes of some blocks of one chunk, keys: [n_layer*n_head_kv, chunk_size] rows of type
void kvl_fill_boxes(ggml_type type, int64_t n_embd_head, int64_t n_head, const uint8_t * keys, int64_t chunk_size, int64_t first_block, int64_t n_block, ggml_fp16_t * boxes);

// see kvl_get_redundancy; dst: F32 [n, n_head_kv, n_layer]
struct kvl_cpu_redundancy {
    std::vector<kvl_stored_keys> keys;  // per layer
    std::vector<int32_t>         order; // [n] cells by ascending position
    int64_t n_embd_head;
    int64_t n_head_kv;

    static void compute(ggml_tensor * dst, int ith, int nth, void * userdata);
};

// attention of single tokens, see kvl_attention
// dst: F32 [d, n_head, n_tokens], then the states [HEADER + d, n_head, n_tokens, n_parts]
struct kvl_cpu_attention {
    static constexpr int64_t HEADER = 32; // floats of a state before its values

    const float scale;
    const int   n_parts; // of the cells

    std::atomic<int> n_done = 0;

    kvl_cpu_attention(float scale, int n_parts) : scale(scale), n_parts(n_parts) {}

    static void compute(ggml_tensor * dst, int ith, int nth, void * userdata);
};

// what is left to do once the twins are known, for the n keys of one head by ascending position
// sums: [n] column sums of the similarity matrix, twin: [n] index or -1, value: [n] similarity to the twin; out: [n]
void kvl_finish_redundancy(int64_t n, float * sums, const float * twin, const float * value, float * out);

// these functions, of the ggml-cpu that computes
struct kvl_cpu_kernels {
    decltype(&kvl_cpu_scores::compute)     scores;
    decltype(&kvl_cpu_best_rows::compute)  best_rows;
    decltype(&kvl_cpu_redundancy::compute) redundancy;
    decltype(&kvl_cpu_attention::compute)  attention; // nullptr where ggml's own is the faster one
    decltype(&kvl_fill_boxes)              fill_boxes;
    decltype(&kvl_finish_redundancy)       finish_redundancy;
};

// ggml_backend_reg_get_proc_address gives it by this name
const kvl_cpu_kernels * kvl_get_cpu_kernels();
