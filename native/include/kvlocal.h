// kvlocal: attention scores, removal and compaction of KV cells in llama.cpp.
//
// The C API of the patched libllama and, between the two cffi marks, the cdef that the Python side reads.
//
// Terms: a *cell* is a slot of the KV cache; cells are numbered from 0 within the stream of their sequence, and the
// used part of a stream is [0, n_cells), holes included. *Layer* counts the compressible layers only (all layers of a
// plain model, the global layers of a sliding-window one, the attention layers of a hybrid one). All arrays are dense, row-major, in host memory.
//
// Every call returns >= 0, or a kvl_status below zero and a message for kvl_last_error().
// No call may run at the same time as another one, or as a decode, on the same context. What takes kvl_queries has no context.

#ifndef KVLOCAL_H
#define KVLOCAL_H

#include <stdint.h>

struct llama_context;
struct llama_vocab;
struct kvl_queries;

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

/* cffi: begin */

enum {
    KVL_API_VERSION = 11
};

enum {
    KVL_BLOCK_SIZE = 16, // keys that share a box
    KVL_CHUNK_UNIT = 256 // sizes of chunks with boxes are multiples of it
};

enum kvl_status {
    KVL_OK              =  0,
    KVL_ERR_ARGUMENT    = -1, // a null pointer, a sequence, layer, cell or size out of range
    KVL_ERR_UNSUPPORTED = -2, // this model or cache can't be compressed
    KVL_ERR_STATE       = -3, // not now: the ring is off, no query was recorded, the caller's cell count is stale
    KVL_ERR_MEMORY      = -4, // out of memory
    KVL_ERR_COMPUTE     = -5, // a backend failed
    KVL_ERR_INTERNAL    = -6  // an exception inside llama.cpp
};

enum kvl_score_flags {
    KVL_PORTABLE = 1, // use ggml's own operations only, as GPU backends do, even on the CPU
    KVL_LARGEST  = 2, // scores: the maximum over the queries instead of the mean
    KVL_BESIDE   = 4  // queries: what they compute leaves half of the threads to the context, which decodes meanwhile
};

struct kvl_layout {
    int32_t n_layer;       // compressible layers
    int32_t n_head;        // query heads of each
    int32_t n_head_kv;     // KV heads of each
    int32_t n_embd_head_k; // key size of one head
    int32_t n_embd_head_v; // value size of one head
    int32_t n_seq_max;     // sequences, each in a stream of its own
    int32_t n_cells_max;   // capacity of a stream
    int32_t n_window;      // queries the ring holds per sequence, 0 while it is off
    int32_t is_swa;        // 1: a sliding-window model, the layers here are its global ones
    int32_t is_recurrent;  // 1: a hybrid model, the layers here are those with attention; the others have a state of fixed size
    int32_t can_rotate;    // 1: kept keys can be moved to new positions
    int32_t is_on_device;  // 1: the cells of all these layers are on devices other than the CPU
    int32_t type_k;        // ggml_type of a stored key
    int32_t type_v;        // ggml_type of a stored value
    int32_t row_size_k;    // bytes of a stored key of one head
    int32_t row_size_v;    // bytes of a stored value of one head
};

// keys and values of n_rows cells in host memory, in chunks of chunk_size rows; row r is row r % chunk_size of chunk r / chunk_size
// types: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0 or IQ4_NL of ggml_type, of which the rows of a head are whole blocks; the cache's own, or others
// what moves between rows and cells of one type moves as bytes, between others by way of float32, rounded as ggml's reference functions do
struct kvl_rows {
    uint8_t * const * k; // [n_chunk] of [n_layer, n_head_kv, chunk_size, bytes of a key of type_k]
    uint8_t * const * v; // [n_chunk] of [n_layer, n_head_kv, chunk_size, bytes of a value of type_v]

    int64_t n_bytes_k; // of each chunk
    int64_t n_bytes_v;
    int32_t n_chunk;
    int32_t chunk_size;
    int32_t n_rows;
    int32_t type_k;
    int32_t type_v;
};

// the version of this interface, to be compared with KVL_API_VERSION
int32_t kvl_api_version(void);

// the upstream release the patches were made for and the number of patches
const char * kvl_patch_level(void);

// why the last call on this thread failed, "" if none did
const char * kvl_last_error(void);

// keep the last n_window queries of every layer and sequence beside the KV cache; 0 switches the ring off
// n_window <= n_ubatch; the next decode reserves its graphs again
int32_t kvl_ring_enable(struct llama_context * ctx, int32_t n_window);

// compute the attention of a few tokens to an f16 cache on the CPU by our own operation (on != 0, as at first) or always by ggml's
// the next decode reserves its graphs again
int32_t kvl_attention_enable(struct llama_context * ctx, int32_t on);

int32_t kvl_get_layout(struct llama_context * ctx, struct kvl_layout * layout);

// indices of the compressible layers in the model; layer_ids: [n_layer]
int32_t kvl_get_layers(struct llama_context * ctx, int32_t * layer_ids, int32_t n_layer);

// positions of the cells of a sequence, -1 for a hole; pos: [n_max] or NULL
// returns n_cells, which may be larger than n_max: then nothing is written
int32_t kvl_get_cells(struct llama_context * ctx, int32_t seq_id, int32_t * pos, int32_t n_max);

// positions of the queries in the ring, ascending and without gaps, the last one at the sequence's end
// returns their number, as kvl_get_cells does
int32_t kvl_get_queries(struct llama_context * ctx, int32_t seq_id, int32_t * pos, int32_t n_max);

// what the ring holds of a sequence, as bytes; a state fits a ring of the same size in a context of the same model
// kvl_ring_get_state: returns their number, which may be larger than n_max: then, or if state is NULL, nothing is written
int64_t kvl_ring_get_state(struct llama_context * ctx, int32_t seq_id, uint8_t * state, int64_t n_max);
int32_t kvl_ring_set_state(struct llama_context * ctx, int32_t seq_id, const uint8_t * state, int64_t n_bytes);

// the attention that the last n_query recorded queries (0: all) pay to each cell:
// the mean over the queries of the maximum over the group of query heads of the softmax weights; 0 for holes
// flags: KVL_PORTABLE, KVL_LARGEST; scores: [n_layer, n_head_kv, n_cells]
int32_t kvl_get_scores(struct llama_context * ctx, int32_t seq_id, int32_t n_query, int32_t flags,
        float * scores, int32_t n_layer, int32_t n_head_kv, int32_t n_cells);

// copies the last n_query recorded queries (0: all) to host memory, where they score keys in host memory while the context does something else;
// models with a soft cap or sinks are not supported; kvl_free_queries frees them, also when the context is gone
// every: each every-th of them, the last one among them
// flags: KVL_BESIDE; shifts: [n_shift] by how many positions the keys that they meet may be moved, besides 0
int32_t kvl_copy_queries(struct llama_context * ctx, int32_t seq_id, int32_t n_query, int32_t every, int32_t flags,
        const int32_t * shifts, int32_t n_shift, struct kvl_queries ** queries);
void kvl_free_queries(struct kvl_queries * queries);

// what kvl_get_scores gives, for keys in host memory, the last of which belong to the queries
// chunks: [n_chunk] of [n_layer, n_head_kv, chunk_size, bytes of a key of type] as kvl_read_rows gives them, rotated as the cache's keys are
// type: as type_k of kvl_rows
// starts, shifts: [n_stretch] the keys from starts[i] on, up to the next start, count as if rotated by shifts[i] more positions; starts ascend
// from 0, and n_stretch is 0 where no key is at another position than the queries expect
// flags: KVL_LARGEST; scores: [n_layer, n_head_kv, n_rows]
int32_t kvl_get_row_scores(const struct kvl_queries * queries, int32_t flags,
        const uint8_t * const * chunks, int32_t type, int32_t n_chunk, int32_t chunk_size,
        const int32_t * starts, const int32_t * shifts, int32_t n_stretch,
        float * scores, int32_t n_layer, int32_t n_head_kv, int32_t n_rows);

// the boxes of some blocks of a chunk of keys: the least and the largest number in each channel of the KVL_BLOCK_SIZE keys of a block, as F16
// keys, type: a chunk as above, chunk_size a multiple of KVL_CHUNK_UNIT; boxes: [n_layer, n_head_kv, 2, n_embd_head_k, chunk_size/KVL_BLOCK_SIZE], n_bytes
int32_t kvl_get_boxes(struct llama_context * ctx, const uint8_t * keys, int32_t type, int32_t chunk_size, int32_t first_block, int32_t n_block,
        uint16_t * boxes, int64_t n_bytes, int32_t n_layer, int32_t n_head_kv);

// for each head the rows [0, first) and [last, n_rows), and of the blocks between those in which the queries may find most by their boxes,
// by ascending number; and their scores, as kvl_get_row_scores gives them where only these rows exist
// n_bound: so many of the queries, spread over them, meet the boxes
// boxes: [n_chunk], filled for all blocks before `last`; first, last: multiples of KVL_BLOCK_SIZE, the queries' own keys are behind `last`
// rows: [n_layer, n_head_kv, n_best]; scores: the same; n_best - first - (n_rows - last) is a multiple of KVL_BLOCK_SIZE
int32_t kvl_get_best_rows(const struct kvl_queries * queries, int32_t n_bound,
        const uint8_t * const * chunks, int32_t type, const uint16_t * const * boxes, int32_t n_chunk, int32_t chunk_size, int32_t n_rows,
        const int32_t * starts, const int32_t * shifts, int32_t n_stretch, int32_t first, int32_t last,
        int32_t * rows, float * scores, int32_t n_layer, int32_t n_head_kv, int32_t n_best);

// the softmax weights of the last n_query recorded queries in the chosen layers, mean over the query heads
// map: [n_chosen, n_query, n_cells], the queries by ascending position
int32_t kvl_get_attention_map(struct llama_context * ctx, int32_t seq_id, int32_t n_query,
        const int32_t * layers, int32_t n_chosen, float * map, int32_t n_cells);

// how much each key repeats others of its head: the softmax over cells of the column means of the cosine similarities,
// where each row leaves out itself and the most recent key more similar to it than 0.5; 0 for holes
// flags: KVL_PORTABLE; redundancy: [n_layer, n_head_kv, n_cells]
int32_t kvl_get_redundancy(struct llama_context * ctx, int32_t seq_id, int32_t flags,
        float * redundancy, int32_t n_layer, int32_t n_head_kv, int32_t n_cells);

// free these cells for all heads; leaves holes
// cells: [n_remove], without repeats
int32_t kvl_remove_cells(struct llama_context * ctx, int32_t seq_id,
        const int32_t * cells, int32_t n_remove, int32_t n_cells);

// cell j of a head becomes a copy of what gather[.., j] names, for all j < n_keep; the cells behind are freed
// what is not rotated is copied bit by bit, whatever its type, but for rows of another type; rotated keys of a quantised cache are quantised again
// gather: [n_layer, n_head_kv, n_keep], used cells, or n_cells + r for row r of rows
// pos:    [n_keep] positions of the new cells for the causal mask, strictly ascending
// delta:  [n_layer, n_head_kv, n_keep] by how many positions each kept key is rotated, or NULL for none
// rows:   what the caller brings along, or NULL; with them the sequence may have no cells, and n_keep may be larger than n_cells
// flags:  KVL_PORTABLE
// a rotation of the last n_window cells empties the ring: the queries in it were made for the old positions
// unless KVL_ERR_COMPUTE is returned, nothing has changed after an error
int32_t kvl_compact(struct llama_context * ctx, int32_t seq_id,
        const int32_t * gather, const int32_t * pos, const int32_t * delta, const struct kvl_rows * rows, int32_t flags,
        int32_t n_layer, int32_t n_head_kv, int32_t n_keep, int32_t n_cells);

// keys and values of these cells of all layers and heads, in the types of rows
// cells: [rows->n_rows], used cells; rows: one chunk, which is filled
int32_t kvl_read_rows(struct llama_context * ctx, int32_t seq_id, const int32_t * cells, const struct kvl_rows * rows,
        int32_t n_layer, int32_t n_head_kv, int32_t n_cells);

// shift the positions that a sliding-window cache, or a recurrent state, holds for a sequence, so that they follow a rotated base cache
// cells whose position falls below zero are freed; with neither of the two this does nothing
int32_t kvl_shift_beside(struct llama_context * ctx, int32_t seq_id, int32_t delta);

// what is stored, as float32: keys and values as attention reads them, i.e. rotated by the Hadamard matrix where
// llama.cpp does that (quantised caches), queries likewise
// k: [n_head_kv, n_cells, n_embd_head_k]; v: [n_head_kv, n_cells, n_embd_head_v]; q: [n_query, n_head, n_embd_head_k]
int32_t kvl_read_keys   (struct llama_context * ctx, int32_t seq_id, int32_t layer, float * k, int32_t n_cells);
int32_t kvl_read_values (struct llama_context * ctx, int32_t seq_id, int32_t layer, float * v, int32_t n_cells);
int32_t kvl_read_queries(struct llama_context * ctx, int32_t seq_id, int32_t layer, float * q, int32_t n_query);

// the factor attention applies to q.k in a layer, known after the first decode with the ring on; scale: one number
int32_t kvl_get_kq_scale(struct llama_context * ctx, int32_t layer, float * scale);

// whether llama.cpp's grammar sampler takes this grammar: text, n bytes in GBNF without a zero, whose start is the rule "root". KVL_ERR_ARGUMENT if
// not; the message says what is wrong with it.
int32_t kvl_grammar_check(const struct llama_vocab * vocab, const char * text, int64_t n);

// a log callback that drops what it gets
void kvl_log_discard(int32_t level, const char * text, void * user_data);

// where ggml aborts the process, one sentence on stderr takes the place of its backtrace
void kvl_abort_in_a_sentence(void);

/* cffi: end */

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
