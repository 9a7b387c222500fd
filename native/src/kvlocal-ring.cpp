// The query ring: the last queries of each layer, written by the decode graph itself.

#include "kvlocal-impl.h"

#include <algorithm>
#include <cstring>

ggml_tensor * kvl_ring_build_input(ggml_context * ctx, const llama_kv_cache_context * mctx, const llama_ubatch & ubatch) {
    if (!kvl_access::ring(*kvl_access::kv_of(*mctx))) {
        return nullptr;
    }

    ggml_tensor * idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, ubatch.n_tokens);
    ggml_set_input(idxs);
    ggml_set_name(idxs, "kvl_ring_idxs");

    return idxs;
}

// dst: a dummy; its sources: ring rows I64 [n_tokens], then the queries of the group's layers F32 [n_embd_q, n_tokens]
static void write_queries(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & group = *(const kvl_ring::group *) userdata;

    const int64_t * rows = (const int64_t *) dst->src[0]->data;

    const int64_t n_tokens = dst->src[0]->ne[0];
    const int64_t n_kept   = (int64_t) group.ring->n_seq*group.ring->n_window;

    for (size_t g = ith; g < group.layers.size(); g += nth) {
        const ggml_tensor * q    = dst->src[1 + g];
        const ggml_tensor * ring = group.ring->layers[group.layers[g]].q;

        for (int64_t i = 0; i < n_tokens; ++i) {
            if (rows[i] < n_kept) {
                memcpy((char *) ring->data + rows[i]*ring->nb[1], (const char *) q->data + i*q->nb[1], ring->nb[1]);
            }
        }
    }
}

void kvl_ring_build_write(
                    ggml_context * ctx,
                     ggml_cgraph * gf,
    const llama_kv_cache_context * mctx,
                     ggml_tensor * idxs,
                     ggml_tensor * q_cur,
                     ggml_tensor * kq_b,
                     ggml_tensor * sinks,
                           float   kq_scale,
                             int   il) {
    if (!idxs) {
        return;
    }

    auto * kv   = kvl_access::kv_of(*mctx);
    auto & ring = *kvl_access::ring(*kv);

    const int32_t i_layer = kvl_access::layer_of(*kv, il);

    auto & layer = ring.layers[i_layer];

    layer.sinks    = sinks;
    layer.kq_scale = kq_scale;
    layer.has_bias = kq_b != nullptr;

    const int64_t n_embd_q = q_cur->ne[0]*q_cur->ne[1];
    const int64_t n_tokens = q_cur->ne[2];

    ggml_tensor * q = ggml_is_contiguous(q_cur)
        ? ggml_reshape_2d(ctx, q_cur, n_embd_q, n_tokens)
        : ggml_cont_2d   (ctx, q_cur, n_embd_q, n_tokens);

    if (ring.groups.empty()) {
        ggml_build_forward_expand(gf, ggml_set_rows(ctx, layer.q, q, idxs));
        return;
    }

    // on the CPU every node costs a barrier, so one stores the queries of several layers
    auto & group = ring.groups[i_layer/kvl_ring::group::SIZE];

    if (i_layer == group.layers.front()) {
        group.queries = { idxs };
    }
    group.queries.push_back(q);

    if (i_layer == group.layers.back()) {
        ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_I32, 1, 1, 1, 1,
                    group.queries.data(), group.queries.size(), write_queries, GGML_N_TASKS_MAX, &group));
    }
}

void kvl_ring_set_input(const llama_kv_cache_context * mctx, ggml_tensor * idxs, const llama_ubatch * ubatch) {
    if (!idxs || !idxs->buffer) {
        return;
    }

    GGML_ASSERT(ggml_backend_buffer_is_host(idxs->buffer));

    auto & ring = *kvl_access::ring(*kvl_access::kv_of(*mctx));

    // only the last n_window queries of each sequence are kept
    std::vector<llama_pos> pos_max(ring.n_seq, -1);
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        auto & p = pos_max[ubatch->seq_id[i][0]];
        p = std::max(p, ubatch->pos[i]);
    }

    const int64_t row_spare = (int64_t) ring.n_seq*ring.n_window;

    int64_t * data = (int64_t *) idxs->data;

    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        const llama_seq_id s = ubatch->seq_id[i][0];
        const llama_pos    p = ubatch->pos[i];

        if (p > pos_max[s] - ring.n_window) {
            data[i] = ring.row(s, p);
            ring.pos[data[i]] = p;
        } else {
            data[i] = row_spare;
        }
    }
}

void kvl_ring_invalidate(kvl_ring * ring, int32_t seq_id) {
    if (!ring) {
        return;
    }

    const auto first = seq_id < 0 ? ring->pos.begin() : ring->pos.begin() + (int64_t) seq_id*ring->n_window;
    const auto last  = seq_id < 0 ? ring->pos.end()   : first + ring->n_window;

    std::fill(first, last, -1);
}

std::vector<llama_pos> kvl_valid_queries(const kvl_cache & cache, int32_t seq_id) {
    const auto & ring = *kvl_access::ring(*cache.kv);

    std::vector<llama_pos> res;

    const llama_pos p_end = cache.kv->seq_pos_max(seq_id);

    // from the end backwards, as long as each row still holds the query of that very position
    for (llama_pos p = p_end; p >= 0 && p > p_end - ring.n_window && ring.pos[ring.row(seq_id, p)] == p; --p) {
        res.push_back(p);
    }

    std::reverse(res.begin(), res.end());

    return res;
}

std::vector<llama_pos> kvl_select_queries(const kvl_cache & cache, int32_t seq_id, int32_t n_query) {
    auto pos = kvl_valid_queries(cache, seq_id);

    if (pos.empty()) {
        throw kvl_error(KVL_ERR_STATE, "no query of this sequence is recorded: decode at least one token with the ring on");
    }
    if (n_query > (int32_t) pos.size()) {
        throw kvl_error(KVL_ERR_STATE, std::to_string(n_query) + " queries were asked for, " + std::to_string(pos.size()) + " are recorded");
    }
    if (n_query > 0) {
        pos.erase(pos.begin(), pos.end() - n_query);
    }

    return pos;
}

// the rows of one sequence lie together: its positions, then each layer's queries
static size_t position_bytes(const kvl_ring & ring) {
    return ring.n_window*sizeof(llama_pos);
}

static size_t query_bytes(const kvl_ring & ring) {
    return ring.layers[0].q->nb[1]*ring.n_window; // the layers are alike, see kvl_find_cache
}

size_t kvl_ring_state_size(const kvl_ring & ring) {
    return position_bytes(ring) + ring.layers.size()*query_bytes(ring);
}

void kvl_ring_get_state(const kvl_ring & ring, int32_t seq_id, uint8_t * state) {
    memcpy(state, ring.pos.data() + (size_t) seq_id*ring.n_window, position_bytes(ring));
    state += position_bytes(ring);

    for (const auto & layer : ring.layers) {
        ggml_backend_tensor_get(layer.q, state, seq_id*query_bytes(ring), query_bytes(ring));
        state += query_bytes(ring);
    }
}

void kvl_ring_set_state(kvl_ring & ring, int32_t seq_id, const uint8_t * state) {
    for (int32_t i = 0; i < ring.n_window; ++i) {
        llama_pos p;
        memcpy(&p, state + i*sizeof(p), sizeof(p));

        if (p < -1 || (p >= 0 && p%ring.n_window != i)) {
            throw kvl_error(KVL_ERR_ARGUMENT, "this is no state of a query ring");
        }
    }

    memcpy(ring.pos.data() + (size_t) seq_id*ring.n_window, state, position_bytes(ring));
    state += position_bytes(ring);

    for (const auto & layer : ring.layers) {
        ggml_backend_tensor_set(layer.q, state, seq_id*query_bytes(ring), query_bytes(ring));
        state += query_bytes(ring);
    }
}
