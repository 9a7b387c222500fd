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

kvl_queries kvl_copy_queries(const kvl_cache & cache, int32_t seq_id, int32_t n_query, int32_t every, const int32_t * shifts, int32_t n_shift) {
    if (!kvl_is_plain_attention(cache)) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "keys outside the cache can't be scored for models with a soft cap or attention sinks");
    }

    const auto & ring = *kvl_access::ring(*cache.kv);
    const auto   all  = kvl_select_queries(cache, seq_id, n_query);

    kvl_queries res = {};

    std::vector<llama_pos> pos;

    for (const llama_pos p : all) {
        if ((all.back() - p) % every == 0) {
            pos.push_back(p);
            res.before.push_back(all.back() - p);
        }
    }

    res.n_query       = pos.size();
    res.n_embd_q      = ring.layers[0].q->ne[0]; // the layers are alike, see kvl_find_cache
    res.n_layer       = cache.n_layer;
    res.n_head        = cache.n_head;
    res.n_head_kv     = cache.n_head_kv;
    res.n_embd_head_k = cache.n_embd_head_k;
    res.n_threads     = cache.lctx->n_threads_batch();

    for (const auto & layer : ring.layers) {
        res.scales.push_back(layer.kq_scale);
    }

    res.shifts = { 0 };
    for (int32_t s = 0; s < n_shift; ++s) {
        if (std::find(res.shifts.begin(), res.shifts.end(), shifts[s]) == res.shifts.end()) {
            res.shifts.push_back(shifts[s]);
        }
    }

    const int64_t n_copy = res.shifts.size();
    const int64_t n_one  = res.n_query*res.n_embd_q;

    res.data.resize(cache.n_layer*n_copy*n_one);

    cache.lctx->synchronize();

    // one transfer of the rows that hold them takes less than one for each
    std::vector<int32_t> rows;

    for (const llama_pos p : pos) {
        rows.push_back((int32_t) ring.row(seq_id, p));
    }

    const auto [first, last] = std::minmax_element(rows.begin(), rows.end());

    std::vector<float> held((*last - *first + 1)*res.n_embd_q);

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        const ggml_tensor * q = ring.layers[i].q;

        ggml_backend_tensor_get(q, held.data(), *first*q->nb[1], held.size()*sizeof(float));

        float * out = res.data.data() + i*n_copy*n_one;

        for (const int32_t row : rows) {
            out = std::copy_n(held.data() + (row - *first)*res.n_embd_q, res.n_embd_q, out);
        }
    }

    if (n_copy == 1) {
        return res;
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

namespace {

std::vector<kvl_stretch> stretches_of(const kvl_queries & queries, const kvl_host_keys & keys) {
    if (keys.n_stretch == 0) {
        return { { 0, 0 } };
    }

    std::vector<kvl_stretch> res;

    for (int32_t s = 0; s < keys.n_stretch; ++s) {
        const auto copy = std::find(queries.shifts.begin(), queries.shifts.end(), keys.shifts[s]) - queries.shifts.begin();

        if (copy == (int64_t) queries.shifts.size()) {
            throw kvl_error(KVL_ERR_ARGUMENT, "the queries were not copied for keys that are moved by " + std::to_string(keys.shifts[s]) + " positions");
        }

        res.push_back({ keys.starts[s], (int32_t) copy });
    }

    return res;
}

// scores of keys in host memory, n_column of which are looked at, the queries' own at the end
kvl_cpu_scores scores_of(const kvl_queries & queries, const kvl_host_keys & keys, int64_t n_column, bool largest) {
    const int64_t n_pad = kvl_pad_cells(n_column);

    kvl_cpu_scores task = {
        {}, {}, queries.scales, {}, std::vector<float>(queries.n_query*n_pad, -INFINITY), n_pad, queries.n_embd_head_k, queries.n_head, queries.n_head_kv,
        largest, stretches_of(queries, keys),
    };

    for (int32_t q = 0; q < queries.n_query; ++q) {
        task.rows.push_back(q);
        std::fill_n(task.mask.begin() + q*n_pad, n_column - queries.before[q], 0.0f);
    }

    for (int32_t i = 0; i < queries.n_layer; ++i) {
        task.keys   .emplace_back(keys.chunks, keys.chunk_size, keys.type, queries.n_embd_head_k, queries.n_head_kv, i);
        task.queries.push_back(queries.layer(i));
    }

    return task;
}

void check_own(const kvl_queries & queries, int64_t n_keys) {
    if (queries.before.front() >= n_keys) {
        throw kvl_error(KVL_ERR_ARGUMENT, "there are fewer keys than queries");
    }
}

// out: F32 [n_layer, n_head_kv, n], of an operation on the CPU, in a graph of its own: the context may be decoding
void compute(const kvl_queries & queries, int64_t n, ggml_custom_op_t op, void * userdata, float * out) {
    ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };

    const ggml_init_params params = { 4*ggml_tensor_overhead() + ggml_graph_overhead_custom(4, false), nullptr, true };
    ggml_context_ptr ctx { ggml_init(params) };

    if (!backend || !ctx) {
        throw kvl_error(KVL_ERR_MEMORY, "out of memory for a graph");
    }

    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    auto * set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");

    if (set) {
        set(backend.get(), queries.n_threads);
    }

    ggml_tensor * t  = ggml_custom_4d(ctx.get(), GGML_TYPE_F32, n, queries.n_head_kv, queries.n_layer, 1, nullptr, 0, op, GGML_N_TASKS_MAX, userdata);
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 4, false);

    ggml_build_forward_expand(gf, t);

    ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    if (!buffer) {
        throw kvl_error(KVL_ERR_MEMORY, "out of memory for a graph's buffers");
    }

    const auto status = ggml_backend_graph_compute(backend.get(), gf);
    if (status != GGML_STATUS_SUCCESS) {
        throw kvl_error(KVL_ERR_COMPUTE, std::string("a graph could not be computed: ") + ggml_status_to_string(status));
    }

    ggml_backend_tensor_get(t, out, 0, ggml_nbytes(t));
}

} // namespace

void kvl_row_scores(const kvl_queries & queries, bool largest, const kvl_host_keys & keys, float * scores) {
    check_own(queries, keys.n_rows);

    auto task = scores_of(queries, keys, keys.n_rows, largest);

    compute(queries, keys.n_rows, kvl_kernels().scores, &task, scores);
}

void kvl_best_rows(const kvl_queries & queries, const kvl_host_keys & keys, const kvl_search & search, int32_t * rows, float * scores) {
    check_own(queries, keys.n_rows - search.last);

    const auto task = scores_of(queries, keys, search.n_best, false);

    kvl_cpu_best_rows best = {
        task, search.boxes, keys.chunk_size/KVL_BLOCK, std::min<int64_t>(search.n_bound, queries.n_query),
        keys.n_rows, search.first, search.last, search.n_block, rows,
    };

    compute(queries, search.n_best, kvl_kernels().best_rows, &best, scores);
}

void kvl_boxes(const kvl_cache & cache, const uint8_t * keys, ggml_type type, int32_t chunk_size, int32_t first_block, int32_t n_block, uint16_t * boxes) {
    const size_t n_keys  = (size_t) cache.n_head_kv*chunk_size*ggml_row_size(type, cache.n_embd_head_k);
    const size_t n_boxes = (size_t) cache.n_head_kv*2*cache.n_embd_head_k*(chunk_size/KVL_BLOCK);

    const auto fill = kvl_kernels().fill_boxes;

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        fill(type, cache.n_embd_head_k, cache.n_head_kv, keys + i*n_keys, chunk_size, first_block, n_block, boxes + i*n_boxes);
    }
}
