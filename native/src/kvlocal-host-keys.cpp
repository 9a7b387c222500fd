// Scores of keys in host memory, which may be rotated to other positions than the queries are.

#include "kvlocal-cpu.h"
#include "kvlocal-impl.h"

#include <algorithm>
#include <cmath>

bool kvl_is_plain_attention(const kvl_cache & cache) {
    const auto & noted = kvl_access::ring(*cache.kv)->layers;

    return !kvl_access::hparams(*cache.kv).attn_soft_cap &&
        std::none_of(noted.begin(), noted.end(), [](const auto & layer) { return layer.sinks; });
}

namespace {

// the recorded queries of all layers: rotating the few queries back has the effect of rotating the many keys
struct query_copies {
    std::vector<int32_t> shifts; // of each copy, the first is 0
    std::vector<float>   data;   // [n_layer, n_copy, n_query, n_embd_q]
    std::vector<int32_t> before; // [n_query] by how many tokens each is older than the last one

    int64_t n_query;
    int64_t n_embd_q;

    const float * layer(int64_t i) const { return data.data() + i*shifts.size()*n_query*n_embd_q; }
};

// every: each every-th of them, the last one among them
query_copies copy_queries(const kvl_cache & cache, int32_t seq_id, int32_t n_query, int32_t every, const kvl_host_keys & keys) {
    const auto & ring = *kvl_access::ring(*cache.kv);
    const auto   all  = kvl_select_queries(cache, seq_id, n_query);

    query_copies res;

    std::vector<llama_pos> pos;

    for (const llama_pos p : all) {
        if ((all.back() - p) % every == 0) {
            pos.push_back(p);
            res.before.push_back(all.back() - p);
        }
    }

    res.n_query  = pos.size();
    res.n_embd_q = ring.layers[0].q->ne[0]; // the layers are alike, see kvl_find_cache

    res.shifts = { 0 };
    for (int32_t s = 0; s < keys.n_stretch; ++s) {
        if (std::find(res.shifts.begin(), res.shifts.end(), keys.shifts[s]) == res.shifts.end()) {
            res.shifts.push_back(keys.shifts[s]);
        }
    }

    const int64_t n_copy = res.shifts.size();
    const int64_t n_one  = res.n_query*res.n_embd_q;

    res.data.resize(cache.n_layer*n_copy*n_one);

    cache.lctx->synchronize();

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        float * out = res.data.data() + i*n_copy*n_one;

        for (const llama_pos p : pos) {
            ggml_backend_tensor_get(ring.layers[i].q, out, ring.row(seq_id, p)*ring.layers[i].q->nb[1], ring.layers[i].q->nb[1]);
            out += res.n_embd_q;
        }
    }

    if (n_copy == 1) {
        return res;
    }

    std::vector<int32_t> rows;

    for (const llama_pos p : pos) {
        rows.push_back((int32_t) ring.row(seq_id, p));
    }

    kvl_graph graph(cache, cache.n_layer*(2 + 12*n_copy) + 64);

    auto * ctx = graph.ctx();

    ggml_tensor * idxs     = graph.input(GGML_TYPE_I32, rows.size());
    ggml_tensor * hadamard = kvl_build_k_rot(cache, ctx);

    // what is rotated by the same delta shares its sines
    std::vector<ggml_tensor *> delta { nullptr };

    for (int64_t c = 1; c < n_copy; ++c) {
        delta.push_back(graph.input(GGML_TYPE_I32, 1));
    }

    std::vector<ggml_tensor *> results;

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        const uint32_t il = kvl_access::layers(*cache.kv)[i].il;

        ggml_tensor * q = ggml_get_rows(ctx, ring.layers[i].q, idxs);

        q = ggml_reshape_2d(ctx, q, cache.n_embd_head_k, cache.n_head*pos.size());

        for (int64_t c = 1; c < n_copy; ++c) {
            const bool has_rope = kvl_access::hparams(*cache.kv).has_rope(il);

            results.push_back(has_rope ? kvl_build_rotate(cache, ctx, q, delta[c], hadamard, il) : q);
            graph.output(results.back());
        }
    }

    graph.run([&]() {
        ggml_backend_tensor_set(idxs, rows.data(), 0, ggml_nbytes(idxs));
        for (int64_t c = 1; c < n_copy; ++c) {
            const int32_t back = -res.shifts[c];
            ggml_backend_tensor_set(delta[c], &back, 0, sizeof(back));
        }
        if (hadamard && hadamard->buffer) {
            cache.kv->set_input_k_rot(hadamard);
        }
    });

    float * out = res.data.data();

    for (size_t i = 0; i < results.size(); ++i) {
        // behind the copy of each layer that is not rotated
        out += i%(n_copy - 1) == 0 ? n_one : 0;
        ggml_backend_tensor_get(results[i], out, 0, ggml_nbytes(results[i]));
        out += n_one;
    }

    return res;
}

std::vector<kvl_stretch> stretches_of(const query_copies & queries, const kvl_host_keys & keys) {
    if (keys.n_stretch == 0) {
        return { { 0, 0 } };
    }

    std::vector<kvl_stretch> res;

    for (int32_t s = 0; s < keys.n_stretch; ++s) {
        const auto copy = std::find(queries.shifts.begin(), queries.shifts.end(), keys.shifts[s]) - queries.shifts.begin();

        res.push_back({ keys.starts[s], (int32_t) copy });
    }

    return res;
}

// scores of keys in host memory, n_column of which are looked at, the queries' own at the end
kvl_cpu_scores scores_of(const kvl_cache & cache, const query_copies & queries, const kvl_host_keys & keys, int64_t n_column, bool largest) {
    const int64_t n_pad = kvl_pad_cells(n_column);

    kvl_cpu_scores task = {
        {}, {}, {}, {}, std::vector<float>(queries.n_query*n_pad, -INFINITY), n_pad, cache.n_embd_head_k, cache.n_head, cache.n_head_kv, largest,
        stretches_of(queries, keys),
    };

    for (int32_t q = 0; q < queries.n_query; ++q) {
        task.rows.push_back(q);
        std::fill_n(task.mask.begin() + q*n_pad, n_column - queries.before[q], 0.0f);
    }

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        task.keys   .emplace_back(keys.chunks, keys.chunk_size, keys.type, cache.n_embd_head_k, cache.n_head_kv, i);
        task.queries.push_back(queries.layer(i));
        task.scales .push_back(kvl_access::ring(*cache.kv)->layers[i].kq_scale);
    }

    return task;
}

void check_plain(const kvl_cache & cache) {
    if (!kvl_is_plain_attention(cache)) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "keys outside the cache can't be scored for models with a soft cap or attention sinks");
    }
}

void check_own(const query_copies & queries, int64_t n_keys) {
    if (queries.before.front() >= n_keys) {
        throw kvl_error(KVL_ERR_ARGUMENT, "there are fewer keys than queries");
    }
}

} // namespace

void kvl_row_scores(const kvl_cache & cache, int32_t seq_id, int32_t n_query, bool largest, const kvl_host_keys & keys, float * scores) {
    check_plain(cache);

    const auto queries = copy_queries(cache, seq_id, n_query, 1, keys);

    check_own(queries, keys.n_rows);

    auto task = scores_of(cache, queries, keys, keys.n_rows, largest);

    kvl_graph graph(cache, 8);

    ggml_tensor * out = graph.cpu_op(keys.n_rows, cache.n_head_kv, cache.n_layer, kvl_kernels().scores, &task);

    graph.run([]() {});

    ggml_backend_tensor_get(out, scores, 0, ggml_nbytes(out));
}

void kvl_best_rows(const kvl_cache & cache, int32_t seq_id, int32_t n_query, const kvl_host_keys & keys, const kvl_search & search, int32_t * rows, float * scores) {
    check_plain(cache);

    const auto queries = copy_queries(cache, seq_id, n_query, search.every, keys);

    check_own(queries, keys.n_rows - search.last);

    const auto task = scores_of(cache, queries, keys, search.n_best, false);

    kvl_cpu_best_rows best = {
        task, search.boxes, keys.chunk_size/KVL_BLOCK, std::min<int64_t>(search.n_bound, queries.n_query),
        keys.n_rows, search.first, search.last, search.n_block, rows,
    };

    kvl_graph graph(cache, 8);

    ggml_tensor * out = graph.cpu_op(search.n_best, cache.n_head_kv, cache.n_layer, kvl_kernels().best_rows, &best);

    graph.run([]() {});

    ggml_backend_tensor_get(out, scores, 0, ggml_nbytes(out));
}

void kvl_boxes(const kvl_cache & cache, const uint8_t * keys, ggml_type type, int32_t chunk_size, int32_t first_block, int32_t n_block, uint16_t * boxes) {
    const size_t n_keys  = (size_t) cache.n_head_kv*chunk_size*ggml_row_size(type, cache.n_embd_head_k);
    const size_t n_boxes = (size_t) cache.n_head_kv*2*cache.n_embd_head_k*(chunk_size/KVL_BLOCK);

    const auto fill = kvl_kernels().fill_boxes;

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        fill(type, cache.n_embd_head_k, cache.n_head_kv, keys + i*n_keys, chunk_size, first_block, n_block, boxes + i*n_boxes);
    }
}
