// The C boundary: arguments are checked here, and every exception becomes a return code and a message.

#include "kvlocal-impl.h"

#include <algorithm>
#include <map>
#include <new>

#ifndef KVL_PATCH_LEVEL
#    define KVL_PATCH_LEVEL "unknown"
#endif

static thread_local std::string g_error;

template <typename F>
static auto guard(F && f) -> decltype(f()) {
    g_error.clear();

    try {
        return f();
    } catch (const kvl_error & e) {
        g_error = e.what();
        return e.status;
    } catch (const std::bad_alloc &) {
        g_error = "out of memory";
        return KVL_ERR_MEMORY;
    } catch (const std::exception & e) {
        g_error = e.what();
        return KVL_ERR_INTERNAL;
    } catch (...) {
        g_error = "unknown exception";
        return KVL_ERR_INTERNAL;
    }
}

// the same for what a device takes part in: what it gave is nothing if it was lost meanwhile
template <typename F>
static auto guard_device(llama_context * ctx, F && f) -> decltype(f()) {
    return guard([&]() {
        auto res = decltype(f())();

        if (ctx) {
            kvl_check_devices(*ctx); // nothing can be allocated there any more, which leaves a scheduler in pieces
        }

        try {
            res = f();
        } catch (...) {
            if (ctx) {
                kvl_check_devices(*ctx); // is why
            }
            throw;
        }

        kvl_check_devices(*ctx);

        return res;
    });
}

static void check_pointer(const void * p, const char * name) {
    if (!p) {
        throw kvl_error(KVL_ERR_ARGUMENT, std::string(name) + " is null");
    }
}

static void check_flags(int32_t flags, int32_t known) {
    if (flags & ~known) {
        throw kvl_error(KVL_ERR_ARGUMENT, "unknown flag");
    }
}

static void check_layer(const kvl_cache & cache, int32_t layer) {
    if (layer < 0 || layer >= cache.n_layer) {
        throw kvl_error(KVL_ERR_ARGUMENT, "layer " + std::to_string(layer) + " is not in [0, " + std::to_string(cache.n_layer) + ")");
    }
}

static const kvl_ring & check_ring(const kvl_cache & cache) {
    const auto & ring = kvl_access::ring(*cache.kv);

    if (!ring) {
        throw kvl_error(KVL_ERR_STATE, "the query ring is off: call kvl_ring_enable first");
    }
    for (const auto & layer : ring->layers) {
        if (layer.has_bias) {
            throw kvl_error(KVL_ERR_UNSUPPORTED, "models with an attention bias can't be scored");
        }
    }

    return *ring;
}

static void check_scorable(const kvl_cache & cache, int32_t n_query) {
    check_ring(cache);

    if (n_query < 0) {
        throw kvl_error(KVL_ERR_ARGUMENT, "the number of queries is negative");
    }
}

static bool can_rotate(const kvl_cache & cache) {
    return cache.kv->get_can_shift() && (!cache.swa || cache.swa->get_can_shift()) &&
        kvl_access::hparams(*cache.kv).rope_type != LLAMA_ROPE_TYPE_NONE;
}

int32_t kvl_api_version(void) {
    return KVL_API_VERSION;
}

const char * kvl_patch_level(void) {
    return KVL_PATCH_LEVEL;
}

const char * kvl_last_error(void) {
    return g_error.c_str();
}

int32_t kvl_ring_enable(llama_context * ctx, int32_t n_window) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        auto & ring = kvl_access::ring(*cache.kv);

        if (n_window < 0 || n_window > (int32_t) ctx->n_ubatch()) {
            throw kvl_error(KVL_ERR_ARGUMENT, "a window of " + std::to_string(n_window) + " is not in [0, " + std::to_string(ctx->n_ubatch()) + "], the size of the micro-batch");
        }

        ctx->synchronize();

        if (n_window == 0) {
            // graphs that write to it must not run again
            kvl_access::reserve_again(*ctx);
            ring.reset();
            return KVL_OK;
        }

        auto res = std::make_shared<kvl_ring>();

        res->n_window = n_window;
        res->n_seq    = cache.kv->get_n_seq_max();
        res->pos.assign((size_t) res->n_seq*n_window, -1);

        const int64_t n_rows = (int64_t) res->n_seq*n_window + 1;

        std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

        for (const auto & layer : kvl_access::layers(*cache.kv)) {
            auto & ctx_buft = ctx_map[ggml_backend_buffer_get_type(layer.k->buffer)];

            if (!ctx_buft) {
                const ggml_init_params params = { cache.n_layer*ggml_tensor_overhead(), nullptr, true };
                ctx_buft.reset(ggml_init(params));
            }

            kvl_ring::layer ring_layer = {};
            ring_layer.q = ggml_new_tensor_2d(ctx_buft.get(), GGML_TYPE_F32, (int64_t) cache.n_embd_head_k*cache.n_head, n_rows);
            ggml_format_name(ring_layer.q, "kvl_ring_l%d", (int) layer.il);

            res->layers.push_back(ring_layer);
        }

        for (auto & [buft, ctx_buft] : ctx_map) {
            ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx_buft.get(), buft) };
            if (!buf) {
                throw kvl_error(KVL_ERR_MEMORY, "out of memory for the query ring");
            }
            ggml_backend_buffer_clear(buf.get(), 0);
            res->ctxs_bufs.emplace_back(std::move(ctx_buft), std::move(buf));
        }

        for (int32_t i = 0; i < cache.n_layer && kvl_is_on_cpu(cache); ++i) {
            if (i % kvl_ring::group::SIZE == 0) {
                res->groups.push_back({ res.get(), {}, {} });
            }
            res->groups.back().layers.push_back(i);
        }

        kvl_access::reserve_again(*ctx);
        ring = std::move(res);

        return KVL_OK;
    });
}

int32_t kvl_attention_enable(llama_context * ctx, int32_t on) {
    return guard([&]() -> int32_t {
        check_pointer(ctx, "ctx");

        ctx->synchronize();

        kvl_access::cparams(*ctx).kvl_attention = on != 0;
        kvl_access::reserve_again(*ctx);

        return KVL_OK;
    });
}

int32_t kvl_get_layout(llama_context * ctx, kvl_layout * layout) {
    return guard([&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(layout, "layout");

        const auto & ring   = kvl_access::ring(*cache.kv);
        const auto & layers = kvl_access::layers(*cache.kv);

        layout->n_layer       = cache.n_layer;
        layout->n_head        = cache.n_head;
        layout->n_head_kv     = cache.n_head_kv;
        layout->n_embd_head_k = cache.n_embd_head_k;
        layout->n_embd_head_v = cache.n_embd_head_v;
        layout->n_seq_max     = cache.kv->get_n_seq_max();
        layout->n_cells_max   = cache.kv->get_size();
        layout->n_window      = ring ? ring->n_window : 0;
        layout->is_swa        = cache.swa != nullptr;
        layout->is_recurrent  = cache.recr != nullptr;
        layout->can_rotate    = can_rotate(cache);
        layout->is_on_device  = std::none_of(layers.begin(), layers.end(), [](const auto & layer) { return kvl_is_on_cpu(layer.k); });
        layout->type_k        = layers[0].k->type;
        layout->type_v        = kvl_type_v(layers[0]);
        layout->row_size_k    = kvl_row_size_k(cache);
        layout->row_size_v    = kvl_row_size_v(cache);

        return KVL_OK;
    });
}

int32_t kvl_get_layers(llama_context * ctx, int32_t * layer_ids, int32_t n_layer) {
    return guard([&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(layer_ids, "layer_ids");

        if (n_layer != cache.n_layer) {
            throw kvl_error(KVL_ERR_ARGUMENT, "room for " + std::to_string(n_layer) + " layers, the cache has " + std::to_string(cache.n_layer));
        }

        for (const auto & layer : kvl_access::layers(*cache.kv)) {
            *layer_ids++ = (int32_t) layer.il;
        }

        return KVL_OK;
    });
}

int32_t kvl_get_cells(llama_context * ctx, int32_t seq_id, int32_t * pos, int32_t n_max) {
    return guard([&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        kvl_check_seq(cache, seq_id);

        const auto & cells = kvl_access::cells(*cache.kv, seq_id);

        const int32_t n_cells = cells.used_max_p1();

        if (pos && n_cells <= n_max) {
            for (int32_t i = 0; i < n_cells; ++i) {
                pos[i] = cells.is_empty(i) ? -1 : cells.pos_get(i);
            }
        }

        return n_cells;
    });
}

int32_t kvl_get_queries(llama_context * ctx, int32_t seq_id, int32_t * pos, int32_t n_max) {
    return guard([&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        kvl_check_seq(cache, seq_id);
        check_ring(cache);

        const auto queries = kvl_valid_queries(cache, seq_id);

        if (pos && (int32_t) queries.size() <= n_max) {
            std::copy(queries.begin(), queries.end(), pos);
        }

        return queries.size();
    });
}

int64_t kvl_ring_get_state(llama_context * ctx, int32_t seq_id, uint8_t * state, int64_t n_max) {
    return guard_device(ctx, [&]() -> int64_t {
        const auto cache = kvl_find_cache(ctx);

        kvl_check_seq(cache, seq_id);

        const auto & ring = check_ring(cache);
        const auto   size = (int64_t) kvl_ring_state_size(ring);

        if (state && n_max >= size) {
            ctx->synchronize();

            kvl_ring_get_state(ring, seq_id, state);
        }

        return size;
    });
}

int32_t kvl_ring_set_state(llama_context * ctx, int32_t seq_id, const uint8_t * state, int64_t n_bytes) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(state, "state");
        kvl_check_seq(cache, seq_id);

        const auto size = (int64_t) kvl_ring_state_size(check_ring(cache));

        if (n_bytes != size) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the state has " + std::to_string(n_bytes) + " bytes, the ring holds " + std::to_string(size));
        }

        ctx->synchronize();

        kvl_ring_set_state(*kvl_access::ring(*cache.kv), seq_id, state);

        return KVL_OK;
    });
}

int32_t kvl_get_scores(llama_context * ctx, int32_t seq_id, int32_t n_query, int32_t flags, float * scores, int32_t n_layer, int32_t n_head_kv, int32_t n_cells) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(scores, "scores");
        check_flags(flags, KVL_PORTABLE | KVL_LARGEST);
        check_scorable(cache, n_query);
        kvl_check_shape(cache, seq_id, n_layer, n_head_kv, n_cells);

        kvl_scores(cache, seq_id, n_query, flags & KVL_PORTABLE, flags & KVL_LARGEST, scores, n_cells);

        return KVL_OK;
    });
}

static ggml_type check_key_type(int32_t n_embd_head_k, int32_t type) {
    kvl_row_size(type, n_embd_head_k);

    return (ggml_type) type;
}

static void check_heads(const kvl_queries & queries, int32_t n_layer, int32_t n_head_kv) {
    if (n_layer != queries.n_layer || n_head_kv != queries.n_head_kv) {
        throw kvl_error(KVL_ERR_ARGUMENT, "the arrays are for " + std::to_string(n_layer) + " layers of " + std::to_string(n_head_kv) +
                " KV heads, the queries come from " + std::to_string(queries.n_layer) + " of " + std::to_string(queries.n_head_kv));
    }
}

static void check_host_keys(const kvl_host_keys & keys, int32_t n_chunk) {
    check_pointer(keys.chunks, "chunks");

    if (keys.chunk_size < 1 || n_chunk < 1 || keys.n_rows < 1 || keys.n_rows > (int64_t) n_chunk*keys.chunk_size) {
        throw kvl_error(KVL_ERR_ARGUMENT, std::to_string(keys.n_rows) + " keys are not in " + std::to_string(n_chunk) + " chunks of " + std::to_string(keys.chunk_size));
    }
    for (int32_t i = 0; i < n_chunk; ++i) {
        check_pointer(keys.chunks[i], "a chunk");
    }
    if (keys.n_stretch < 0) {
        throw kvl_error(KVL_ERR_ARGUMENT, "the number of stretches is negative");
    }
    if (keys.n_stretch == 0) {
        return;
    }

    check_pointer(keys.starts, "starts");
    check_pointer(keys.shifts, "shifts");

    for (int32_t s = 0; s < keys.n_stretch; ++s) {
        if (s == 0 ? keys.starts[s] != 0 : keys.starts[s] <= keys.starts[s - 1] || keys.starts[s] >= keys.n_rows) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the stretches must start at ascending keys, the first at key 0; they do not at stretch " + std::to_string(s));
        }
    }
}

int32_t kvl_copy_queries(llama_context * ctx, int32_t seq_id, int32_t n_query, int32_t every, int32_t flags,
        const int32_t * shifts, int32_t n_shift, kvl_queries ** queries) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(queries, "queries");
        check_flags(flags, KVL_BESIDE);
        check_scorable(cache, n_query);
        kvl_check_seq(cache, seq_id);

        if (every < 1) {
            throw kvl_error(KVL_ERR_ARGUMENT, "no query is looked at");
        }
        if (n_shift < 0) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the number of shifts is negative");
        }
        if (n_shift > 0) {
            check_pointer(shifts, "shifts");
        }
        for (int32_t s = 0; s < n_shift; ++s) {
            if (shifts[s] == INT32_MIN) {
                throw kvl_error(KVL_ERR_ARGUMENT, "shift " + std::to_string(s) + " is out of range");
            }
            if (shifts[s] != 0 && !can_rotate(cache)) {
                throw kvl_error(KVL_ERR_UNSUPPORTED, "the keys of this model can't be moved to other positions");
            }
        }

        auto copied = kvl_copy_queries(cache, seq_id, n_query, every, shifts, n_shift);

        if (flags & KVL_BESIDE) {
            copied.n_threads = std::max(1, copied.n_threads/2);
        }

        *queries = new kvl_queries(std::move(copied));

        return KVL_OK;
    });
}

void kvl_free_queries(kvl_queries * queries) {
    delete queries;
}

int32_t kvl_get_row_scores(const kvl_queries * queries, int32_t flags,
        const uint8_t * const * chunks, int32_t type, int32_t n_chunk, int32_t chunk_size,
        const int32_t * starts, const int32_t * shifts, int32_t n_stretch, float * scores, int32_t n_layer, int32_t n_head_kv, int32_t n_rows) {
    return guard([&]() -> int32_t {
        check_pointer(queries, "queries");
        check_pointer(scores, "scores");
        check_flags(flags, KVL_LARGEST);
        check_heads(*queries, n_layer, n_head_kv);

        const kvl_host_keys keys = { chunks, starts, shifts, check_key_type(queries->n_embd_head_k, type), chunk_size, n_rows, n_stretch };

        check_host_keys(keys, n_chunk);

        kvl_row_scores(*queries, flags & KVL_LARGEST, keys, scores);

        return KVL_OK;
    });
}

static void check_chunk_unit(int32_t chunk_size) {
    if (chunk_size < 1 || chunk_size % KVL_CHUNK_UNIT != 0) {
        throw kvl_error(KVL_ERR_ARGUMENT, "chunks of " + std::to_string(chunk_size) + " keys have no boxes: take a multiple of " + std::to_string(KVL_CHUNK_UNIT));
    }
}

int32_t kvl_get_boxes(llama_context * ctx, const uint8_t * keys, int32_t type, int32_t chunk_size, int32_t first_block, int32_t n_block,
        uint16_t * boxes, int64_t n_bytes, int32_t n_layer, int32_t n_head_kv) {
    return guard([&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(keys, "keys");
        check_pointer(boxes, "boxes");
        check_chunk_unit(chunk_size);
        kvl_check_shape(cache, 0, n_layer, n_head_kv, kvl_access::cells(*cache.kv, 0).used_max_p1(), true);

        const auto    key_type = check_key_type(cache.n_embd_head_k, type);
        const int32_t n_box    = chunk_size/KVL_BLOCK_SIZE;
        const int64_t needed   = (int64_t) n_layer*n_head_kv*2*cache.n_embd_head_k*n_box*sizeof(uint16_t);

        if (n_bytes != needed) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the boxes have " + std::to_string(n_bytes) + " bytes, " + std::to_string(needed) + " are needed");
        }
        if (first_block < 0 || n_block < 0 || first_block > n_box || n_block > n_box - first_block) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the blocks are not in [0, " + std::to_string(n_box) + ")");
        }

        kvl_boxes(cache, keys, key_type, chunk_size, first_block, n_block, boxes);

        return KVL_OK;
    });
}

int32_t kvl_get_best_rows(const kvl_queries * queries, int32_t n_bound,
        const uint8_t * const * chunks, int32_t type, const uint16_t * const * boxes, int32_t n_chunk, int32_t chunk_size, int32_t n_rows,
        const int32_t * starts, const int32_t * shifts, int32_t n_stretch, int32_t first, int32_t last,
        int32_t * rows, float * scores, int32_t n_layer, int32_t n_head_kv, int32_t n_best) {
    return guard([&]() -> int32_t {
        check_pointer(queries, "queries");
        check_pointer(boxes, "boxes");
        check_pointer(rows, "rows");
        check_pointer(scores, "scores");
        check_chunk_unit(chunk_size);
        check_heads(*queries, n_layer, n_head_kv);

        const kvl_host_keys keys = { chunks, starts, shifts, check_key_type(queries->n_embd_head_k, type), chunk_size, n_rows, n_stretch };

        check_host_keys(keys, n_chunk);

        for (int32_t i = 0; i < n_chunk; ++i) {
            check_pointer(boxes[i], "a chunk of boxes");
        }
        if (n_bound < 1) {
            throw kvl_error(KVL_ERR_ARGUMENT, "no query meets the boxes");
        }
        if (first < 0 || last < first || last > n_rows || first % KVL_BLOCK_SIZE != 0 || last % KVL_BLOCK_SIZE != 0) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the rows between " + std::to_string(first) + " and " + std::to_string(last) + " are no whole blocks of the keys");
        }

        const int64_t n_chosen = (int64_t) n_best - first - (n_rows - last);

        if (n_chosen < 0 || n_chosen > last - first || n_chosen % KVL_BLOCK_SIZE != 0) {
            throw kvl_error(KVL_ERR_ARGUMENT, std::to_string(n_best) + " rows can't be chosen in whole blocks");
        }

        const kvl_search search = { boxes, n_bound, first, last, (int32_t) (n_chosen/KVL_BLOCK_SIZE), n_best };

        kvl_best_rows(*queries, keys, search, rows, scores);

        return KVL_OK;
    });
}

int32_t kvl_get_attention_map(llama_context * ctx, int32_t seq_id, int32_t n_query, const int32_t * layers, int32_t n_chosen, float * map, int32_t n_cells) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(layers, "layers");
        check_pointer(map, "map");
        check_scorable(cache, n_query);
        kvl_check_shape(cache, seq_id, cache.n_layer, cache.n_head_kv, n_cells);

        if (n_chosen < 1 || n_chosen > cache.n_layer) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the number of chosen layers is not in [1, " + std::to_string(cache.n_layer) + "]");
        }
        for (int32_t i = 0; i < n_chosen; ++i) {
            check_layer(cache, layers[i]);
        }
        // the caller's array has the size it asked for, so the number of queries can't be left open here
        if (n_query == 0) {
            throw kvl_error(KVL_ERR_ARGUMENT, "say how many queries the map is for");
        }

        kvl_attention_map(cache, seq_id, n_query, layers, n_chosen, map, n_cells);

        return KVL_OK;
    });
}

int32_t kvl_get_redundancy(llama_context * ctx, int32_t seq_id, int32_t flags, float * redundancy, int32_t n_layer, int32_t n_head_kv, int32_t n_cells) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(redundancy, "redundancy");
        check_flags(flags, KVL_PORTABLE);
        kvl_check_shape(cache, seq_id, n_layer, n_head_kv, n_cells);

        kvl_redundancy(cache, seq_id, flags & KVL_PORTABLE, redundancy, n_cells);

        return KVL_OK;
    });
}

// a used cell of this sequence
static void check_cell(const llama_kv_cells & cells, int32_t cell, int32_t n_cells) {
    if (cell < 0 || cell >= n_cells) {
        throw kvl_error(KVL_ERR_ARGUMENT, "cell " + std::to_string(cell) + " is not in [0, " + std::to_string(n_cells) + ")");
    }
    if (cells.is_empty(cell)) {
        throw kvl_error(KVL_ERR_ARGUMENT, "cell " + std::to_string(cell) + " is empty");
    }
}

int32_t kvl_remove_cells(llama_context * ctx, int32_t seq_id, const int32_t * cells_rm, int32_t n_remove, int32_t n_cells) {
    return guard([&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        kvl_check_shape(cache, seq_id, cache.n_layer, cache.n_head_kv, n_cells);

        if (n_remove < 0) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the number of cells is negative");
        }
        if (n_remove == 0) {
            return KVL_OK;
        }

        check_pointer(cells_rm, "cells");

        auto & cells = kvl_access::cells(*cache.kv, seq_id);

        std::vector<bool> seen(n_cells, false);
        for (int32_t i = 0; i < n_remove; ++i) {
            check_cell(cells, cells_rm[i], n_cells);
            if (seen[cells_rm[i]]) {
                throw kvl_error(KVL_ERR_ARGUMENT, "cell " + std::to_string(cells_rm[i]) + " is given twice");
            }
            seen[cells_rm[i]] = true;
        }

        auto & head = kvl_access::head(*cache.kv, seq_id);

        for (int32_t i = 0; i < n_remove; ++i) {
            cells.seq_rm(cells_rm[i], seq_id);
            head = std::min(head, (uint32_t) cells_rm[i]);
        }

        return KVL_OK;
    });
}

int32_t kvl_compact(llama_context * ctx, int32_t seq_id, const int32_t * gather, const int32_t * pos, const int32_t * delta, const kvl_rows * rows, int32_t flags,
        int32_t n_layer, int32_t n_head_kv, int32_t n_keep, int32_t n_cells) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(gather, "gather");
        check_pointer(pos, "pos");
        check_flags(flags, KVL_PORTABLE);
        kvl_check_shape(cache, seq_id, n_layer, n_head_kv, n_cells, rows != nullptr);

        if (rows) {
            kvl_check_rows(cache, *rows);
        }

        const int32_t n_max = rows ? (int32_t) cache.kv->get_size() : n_cells;

        if (n_keep < 1 || n_keep > n_max) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the number of kept cells " + std::to_string(n_keep) + " is not in [1, " + std::to_string(n_max) + "]");
        }
        if (delta && !can_rotate(cache)) {
            throw kvl_error(KVL_ERR_UNSUPPORTED, "the keys of this model can't be moved to other positions");
        }

        const auto & cells = kvl_access::cells(*cache.kv, seq_id);

        const size_t  n_idx = (size_t) n_layer*n_head_kv*n_keep;
        const int64_t n_all = n_cells + (rows ? (int64_t) rows->n_rows : 0);

        for (size_t i = 0; i < n_idx; ++i) {
            if (gather[i] < n_cells || gather[i] >= n_all) {
                check_cell(cells, gather[i], n_cells);
            }
        }

        for (int32_t j = 0; j < n_keep; ++j) {
            if (pos[j] < 0 || (j > 0 && pos[j] <= pos[j - 1])) {
                throw kvl_error(KVL_ERR_ARGUMENT, "the positions must be >= 0 and strictly ascending, they are not at cell " + std::to_string(j));
            }
        }

        kvl_compact_cells(cache, seq_id, {
            gather, pos, delta, rows, n_keep, (flags & KVL_PORTABLE) != 0,
        });

        return KVL_OK;
    });
}

int32_t kvl_read_rows(llama_context * ctx, int32_t seq_id, const int32_t * cells, const kvl_rows * rows, int32_t n_layer, int32_t n_head_kv, int32_t n_cells) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(cells, "cells");
        check_pointer(rows, "rows");
        kvl_check_shape(cache, seq_id, n_layer, n_head_kv, n_cells);
        kvl_check_rows(cache, *rows);

        if (rows->n_chunk != 1 || rows->chunk_size != rows->n_rows) {
            throw kvl_error(KVL_ERR_ARGUMENT, "rows are read into one chunk of their own size");
        }

        for (int32_t i = 0; i < rows->n_rows; ++i) {
            check_cell(kvl_access::cells(*cache.kv, seq_id), cells[i], n_cells);
        }

        kvl_read_cells(cache, seq_id, cells, *rows);

        return KVL_OK;
    });
}

int32_t kvl_shift_beside(llama_context * ctx, int32_t seq_id, int32_t delta) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        kvl_check_seq(cache, seq_id);

        if ((cache.swa || cache.recr) && delta != 0) {
            if (!can_rotate(cache)) {
                throw kvl_error(KVL_ERR_UNSUPPORTED, "the keys of this model can't be moved to other positions");
            }
            if (cache.swa) {
                cache.swa->seq_add(seq_id, -1, -1, delta);
            }
            if (cache.recr) {
                cache.recr->seq_add(seq_id, -1, -1, delta);
            }
        }

        return KVL_OK;
    });
}

// cells of one stream as float32, [n_head_kv, n_cells, n_embd_head]
// n_embd_row: numbers of a head that are stored, of which the first n_embd_head are read
static void read_rows(const ggml_tensor * stream, int32_t n_embd_row, int32_t n_embd_head, int32_t n_head_kv, int32_t n_cells, float * out) {
    std::vector<uint8_t> data(stream->nb[1]*n_cells);
    ggml_backend_tensor_get(stream, data.data(), 0, data.size());

    const auto   to_float = ggml_get_type_traits(stream->type)->to_float;
    const size_t size     = ggml_row_size(stream->type, n_embd_row);

    for (int32_t h = 0; h < n_head_kv; ++h) {
        for (int32_t i = 0; i < n_cells; ++i) {
            const uint8_t * src = data.data() + i*stream->nb[1] + h*size;
            float         * dst = out + ((size_t) h*n_cells + i)*n_embd_head;

            if (stream->type == GGML_TYPE_F32) {
                memcpy(dst, src, n_embd_head*sizeof(float));
            } else {
                to_float(src, dst, n_embd_head);
            }
        }
    }
}

int32_t kvl_read_keys(llama_context * ctx, int32_t seq_id, int32_t layer, float * k, int32_t n_cells) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(k, "k");
        check_layer(cache, layer);
        kvl_check_shape(cache, seq_id, cache.n_layer, cache.n_head_kv, n_cells);

        ctx->synchronize();
        read_rows(kvl_access::layers(*cache.kv)[layer].k_stream[cache.kv->get_stream(seq_id)], cache.n_embd_head_k, cache.n_embd_head_k, cache.n_head_kv, n_cells, k);

        return KVL_OK;
    });
}

int32_t kvl_read_values(llama_context * ctx, int32_t seq_id, int32_t layer, float * v, int32_t n_cells) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(v, "v");
        check_layer(cache, layer);
        kvl_check_shape(cache, seq_id, cache.n_layer, cache.n_head_kv, n_cells);

        ctx->synchronize();

        const auto & stored = kvl_access::layers(*cache.kv)[layer];
        const auto & stream = (stored.v ? stored.v_stream : stored.k_stream)[cache.kv->get_stream(seq_id)];

        read_rows(stream, stored.v ? cache.n_embd_head_v : cache.n_embd_head_k, cache.n_embd_head_v, cache.n_head_kv, n_cells, v);

        return KVL_OK;
    });
}

int32_t kvl_read_queries(llama_context * ctx, int32_t seq_id, int32_t layer, float * q, int32_t n_query) {
    return guard_device(ctx, [&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(q, "q");
        check_layer(cache, layer);
        kvl_check_seq(cache, seq_id);

        const auto & ring = check_ring(cache);

        auto pos = kvl_valid_queries(cache, seq_id);

        if (n_query < 1 || n_query > (int32_t) pos.size()) {
            throw kvl_error(KVL_ERR_STATE, std::to_string(n_query) + " queries were asked for, " + std::to_string(pos.size()) + " are recorded");
        }
        pos.erase(pos.begin(), pos.end() - n_query);

        ctx->synchronize();

        const ggml_tensor * rows = ring.layers[layer].q;

        for (const llama_pos p : pos) {
            ggml_backend_tensor_get(rows, q, ring.row(seq_id, p)*rows->nb[1], rows->nb[1]);
            q += rows->ne[0];
        }

        return KVL_OK;
    });
}

int32_t kvl_get_kq_scale(llama_context * ctx, int32_t layer, float * scale) {
    return guard([&]() -> int32_t {
        const auto cache = kvl_find_cache(ctx);

        check_pointer(scale, "scale");
        check_layer(cache, layer);

        const float noted = check_ring(cache).layers[layer].kq_scale;

        if (noted == 0.0f) {
            throw kvl_error(KVL_ERR_STATE, "the scale is not known yet: decode something with the query ring on");
        }

        *scale = noted;

        return KVL_OK;
    });
}

int32_t kvl_grammar_check(const llama_vocab * vocab, const char * text, int64_t n) {
    return guard([&]() -> int32_t {
        check_pointer(vocab, "vocab");
        check_pointer(text, "text");

        if (n < 0) {
            throw kvl_error(KVL_ERR_ARGUMENT, "n is negative");
        }

        kvl_check_grammar(vocab, std::string(text, n));

        return KVL_OK;
    });
}

void kvl_log_discard(int32_t level, const char * text, void * user_data) {
    GGML_UNUSED(level);
    GGML_UNUSED(text);
    GGML_UNUSED(user_data);
}
