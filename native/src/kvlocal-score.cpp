// Scores: what the recorded queries attend to, and how much the keys repeat each other.

#include "kvlocal-cpu.h"
#include "kvlocal-impl.h"

#include <algorithm>
#include <cmath>

namespace {

// the queries of one call and what they may see
struct query_set {
    std::vector<int32_t> rows; // [n_query] ring rows, by ascending position
    std::vector<float>   mask; // [n_query, n_cells] 0 or -inf
};

query_set select_queries(const kvl_cache & cache, int32_t seq_id, int32_t n_query, int32_t n_cells) {
    const auto & ring  = *kvl_access::ring(*cache.kv);
    const auto & cells = kvl_access::cells(*cache.kv, seq_id);

    const auto pos = kvl_select_queries(cache, seq_id, n_query);

    query_set res;

    res.mask.reserve(pos.size()*n_cells);

    for (const llama_pos p : pos) {
        res.rows.push_back((int32_t) ring.row(seq_id, p));

        for (int32_t j = 0; j < n_cells; ++j) {
            res.mask.push_back(!cells.is_empty(j) && cells.pos_get(j) <= p ? 0.0f : -INFINITY);
        }
    }

    return res;
}

// the softmax weights of one layer as its attention computed them: F32 [n_cells, n_query, n_head]
ggml_tensor * build_weights(const kvl_cache & cache, ggml_context * ctx, int32_t i_layer, uint32_t stream, ggml_tensor * rows, ggml_tensor * mask, int32_t n_cells) {
    const auto & hparams = kvl_access::hparams(*cache.kv);
    const auto & layer   = kvl_access::layers(*cache.kv)[i_layer];
    const auto & noted   = kvl_access::ring(*cache.kv)->layers[i_layer];

    const int64_t n_query = rows->ne[0];

    ggml_tensor * k = kvl_view_heads(ctx, layer.k_stream[stream], cache.n_embd_head_k, cache.n_head_kv, n_cells);

    if (ggml_is_quantized(k->type)) {
        // a product with a quantised matrix would quantise the queries too
        k = ggml_cast(ctx, k, GGML_TYPE_F32);
    }

    ggml_tensor * q = ggml_get_rows(ctx, noted.q, rows); // F32 [n_embd_head_k*n_head, n_query]
    q = ggml_reshape_3d(ctx, q, cache.n_embd_head_k, cache.n_head, n_query);

    // the queries of a group side by side: one large product per KV head
    q = ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3)); // [n_embd_head_k, n_query, n_head]
    q = ggml_reshape_3d(ctx, q, cache.n_embd_head_k, n_query*cache.n_head/cache.n_head_kv, cache.n_head_kv);

    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    kq = ggml_reshape_3d(ctx, kq, n_cells, n_query, cache.n_head);

    float scale = noted.kq_scale;

    if (hparams.attn_soft_cap) {
        // softcap before the softmax, as flash attention does it
        const float cap = hparams.f_attn_logit_softcapping;

        kq    = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale/cap)), cap);
        scale = 1.0f;
    }

    kq = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);
    ggml_soft_max_add_sinks(kq, noted.sinks);

    return kq;
}

// mean over the middle axis, x: [n_cells, n_query, n] -> [1, n_cells, n]
ggml_tensor * build_mean_over_queries(ggml_context * ctx, ggml_tensor * x) {
    return ggml_mean(ctx, ggml_cont(ctx, ggml_permute(ctx, x, 1, 0, 2, 3)));
}

// maximum over the middle axis, x: [n_cells, n_query, n] -> [1, n_cells, n]
ggml_tensor * build_largest_over_queries(ggml_context * ctx, ggml_tensor * x) {
    const int64_t n_rows = x->ne[0]*x->ne[2];

    x = ggml_cont_2d(ctx, ggml_permute(ctx, x, 1, 0, 2, 3), x->ne[1], n_rows);

    ggml_tensor * where = ggml_argmax(ctx, x); // I32 [n_rows]

    return ggml_get_rows(ctx, ggml_reshape_3d(ctx, x, 1, x->ne[0], n_rows), ggml_reshape_2d(ctx, where, 1, n_rows));
}

// w: [n_cells, n_query, n_head] -> [1, n_cells, n_head_kv]: maximum over each group of heads, then mean or maximum over the queries
ggml_tensor * build_fold(ggml_context * ctx, ggml_tensor * w, int64_t n_head_kv, bool largest) {
    const int64_t n_cells = w->ne[0];
    const int64_t n_query = w->ne[1];
    const int64_t n_group = w->ne[2]/n_head_kv;

    w = ggml_reshape_3d(ctx, w, n_cells*n_query, n_group, n_head_kv);

    // max(m, a) = m + relu(a - m)
    ggml_tensor * m = nullptr;
    for (int64_t g = 0; g < n_group; ++g) {
        ggml_tensor * a = ggml_view_3d(ctx, w, w->ne[0], 1, w->ne[2], w->nb[1], w->nb[2], g*w->nb[1]);
        m = m ? ggml_add(ctx, m, ggml_relu(ctx, ggml_sub(ctx, a, m))) : ggml_cont(ctx, a);
    }

    m = ggml_reshape_3d(ctx, m, n_cells, n_query, n_head_kv);

    return largest ? build_largest_over_queries(ctx, m) : build_mean_over_queries(ctx, m);
}

// heads whose similarities are computed at once: on a device every operation costs a launch, and n x n numbers cost memory
int64_t heads_at_once(int64_t n, int64_t n_head) {
    constexpr int64_t n_similarities = 1 << 24;
    constexpr int64_t n_rows         = 65535; // what every device takes in one dimension

    return std::clamp<int64_t>(std::min(n_similarities/(n*n), n_rows/n), 1, n_head);
}

// the last other key that is similar to each key of some heads
// kn: [n_embd, n, n_head], order: [n] 1, 2, .. n, itself: [n, n] 2 on the diagonal -> index I32 [n*n_head], similarity F32 [1, 1, n*n_head]
std::pair<ggml_tensor *, ggml_tensor *> build_last_similar(ggml_context * ctx, ggml_tensor * kn, ggml_tensor * order, ggml_tensor * itself) {
    const int64_t n      = kn->ne[1];
    const int64_t n_rows = kn->ne[2]*n;

    ggml_tensor * sim = ggml_mul_mat(ctx, kn, kn); // [n, n, n_head]
    ggml_prec_set_acc(sim, GGML_PREC_F32);

    sim = ggml_sub(ctx, sim, itself); // no key is its own twin

    ggml_tensor * similar = ggml_step(ctx, ggml_scale_bias(ctx, sim, 1.0f, -KVL_SIMILAR));
    ggml_tensor * last    = ggml_argmax(ctx, ggml_reshape_2d(ctx, ggml_mul(ctx, similar, order), n, n_rows)); // I32 [n_rows]

    ggml_tensor * value = ggml_get_rows(ctx, ggml_reshape_3d(ctx, sim, 1, n, n_rows), ggml_reshape_2d(ctx, last, 1, n_rows));

    return { last, value };
}

// the first n_cells of each row of a result, F32 with rows of n_pad
void read_cells(const ggml_tensor * result, int64_t n_pad, int64_t n_cells, float * out) {
    const int64_t n_rows = ggml_nelements(result)/n_pad;

    std::vector<float> padded(n_rows*n_pad);
    ggml_backend_tensor_get(result, padded.data(), 0, padded.size()*sizeof(float));

    for (int64_t i = 0; i < n_rows; ++i) {
        std::copy_n(padded.data() + i*n_pad, n_cells, out + i*n_cells);
    }
}

} // namespace

static std::vector<kvl_stored_keys> stored_keys(const kvl_cache & cache, uint32_t stream) {
    std::vector<kvl_stored_keys> res;
    for (const auto & layer : kvl_access::layers(*cache.kv)) {
        res.emplace_back(layer.k_stream[stream], cache.n_embd_head_k);
    }
    return res;
}

static void scores_on_cpu(const kvl_cache & cache, uint32_t stream, query_set queries, bool largest, float * scores, int32_t n_cells) {
    const int64_t n_pad = kvl_pad_cells(n_cells);

    kvl_cpu_scores task = {
        stored_keys(cache, stream), {}, {}, std::move(queries.rows), std::move(queries.mask), n_pad,
        cache.n_embd_head_k, cache.n_head, cache.n_head_kv, largest,
    };
    for (const auto & noted : kvl_access::ring(*cache.kv)->layers) {
        task.queries.push_back((const float *) noted.q->data);
        task.scales .push_back(noted.kq_scale);
    }

    kvl_graph graph(cache, 8);

    ggml_tensor * out = graph.cpu_op(n_pad, cache.n_head_kv, cache.n_layer, kvl_kernels().scores, &task);

    graph.run([]() {});

    read_cells(out, n_pad, n_cells, scores);
}

void kvl_scores(const kvl_cache & cache, int32_t seq_id, int32_t n_query, bool portable, bool largest, float * scores, int32_t n_cells) {
    const int32_t   n_pad   = kvl_pad_cells(n_cells);
    const query_set queries = select_queries(cache, seq_id, n_query, n_pad);

    const int64_t  n_rows = queries.rows.size();
    const uint32_t stream = cache.kv->get_stream(seq_id);

    if (!portable && kvl_is_on_cpu(cache) && kvl_is_plain_attention(cache)) {
        scores_on_cpu(cache, stream, queries, largest, scores, n_cells);
        return;
    }

    kvl_graph graph(cache, cache.n_layer*(26 + 6*cache.n_head/cache.n_head_kv) + 64);

    auto * ctx = graph.ctx();

    ggml_tensor * rows = graph.input(GGML_TYPE_I32, n_rows);
    ggml_tensor * mask = graph.input(GGML_TYPE_F32, n_pad, n_rows);

    std::vector<ggml_tensor *> results;

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        ggml_tensor * w = build_weights(cache, ctx, i, stream, rows, mask, n_pad);

        results.push_back(build_fold(ctx, w, cache.n_head_kv, largest));
        graph.output(results.back());
    }

    graph.run([&]() {
        ggml_backend_tensor_set(rows, queries.rows.data(), 0, ggml_nbytes(rows));
        ggml_backend_tensor_set(mask, queries.mask.data(), 0, ggml_nbytes(mask));
    });

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        read_cells(results[i], n_pad, n_cells, scores + (int64_t) i*cache.n_head_kv*n_cells);
    }
}

void kvl_attention_map(const kvl_cache & cache, int32_t seq_id, int32_t n_query, const int32_t * layers, int32_t n_chosen, float * map, int32_t n_cells) {
    const int32_t   n_pad   = kvl_pad_cells(n_cells);
    const query_set queries = select_queries(cache, seq_id, n_query, n_pad);

    const int64_t  n_rows = queries.rows.size();
    const uint32_t stream = cache.kv->get_stream(seq_id);

    kvl_graph graph(cache, 24*n_chosen + 64);

    auto * ctx = graph.ctx();

    ggml_tensor * rows = graph.input(GGML_TYPE_I32, n_rows);
    ggml_tensor * mask = graph.input(GGML_TYPE_F32, n_pad, n_rows);

    std::vector<ggml_tensor *> results;

    for (int32_t i = 0; i < n_chosen; ++i) {
        ggml_tensor * w = build_weights(cache, ctx, layers[i], stream, rows, mask, n_pad);

        w = ggml_reshape_3d(ctx, w, n_pad*n_rows, cache.n_head, 1);

        results.push_back(build_mean_over_queries(ctx, w)); // [1, n_pad*n_query]
        graph.output(results.back());
    }

    graph.run([&]() {
        ggml_backend_tensor_set(rows, queries.rows.data(), 0, ggml_nbytes(rows));
        ggml_backend_tensor_set(mask, queries.mask.data(), 0, ggml_nbytes(mask));
    });

    for (int32_t i = 0; i < n_chosen; ++i) {
        read_cells(results[i], n_pad, n_cells, map + i*n_rows*n_cells);
    }
}

// per layer and head, by ascending position: [n_layer, n_head_kv, n]
static void redundancy_on_cpu(const kvl_cache & cache, uint32_t stream, const std::vector<int32_t> & order, float * redundancy) {
    kvl_cpu_redundancy task = { stored_keys(cache, stream), order, cache.n_embd_head_k, cache.n_head_kv };

    kvl_graph graph(cache, 8);

    ggml_tensor * out = graph.cpu_op(order.size(), cache.n_head_kv, cache.n_layer, kvl_kernels().redundancy, &task);

    graph.run([]() {});

    ggml_backend_tensor_get(out, redundancy, 0, ggml_nbytes(out));
}

// the same in ggml's own operations
static void redundancy_portable(const kvl_cache & cache, uint32_t stream, const std::vector<int32_t> & order, float * redundancy, int32_t n_cells) {
    const int64_t n      = order.size();
    const int64_t n_head = cache.n_head_kv;
    const int64_t n_once = heads_at_once(n, n_head);

    kvl_graph graph(cache, cache.n_layer*(24 + 20*((n_head + n_once - 1)/n_once)) + 64);

    auto * ctx = graph.ctx();

    ggml_tensor * idxs = graph.input(GGML_TYPE_I32, n, n_head);
    ggml_tensor * ramp = graph.input(GGML_TYPE_F32, n);
    ggml_tensor * twos = graph.input(GGML_TYPE_F32, n);

    ggml_tensor * itself = ggml_diag(ctx, twos); // [n, n]

    struct layer_result {
        ggml_tensor * sums; // F32 [n, 1, n_head_kv] column sums of the similarity matrix
        std::vector<std::pair<ggml_tensor *, ggml_tensor *>> last; // of n_once heads each, see build_last_similar
    };

    std::vector<layer_result> results;

    for (const auto & layer : kvl_access::layers(*cache.kv)) {
        ggml_tensor * k = kvl_view_heads(ctx, layer.k_stream[stream], cache.n_embd_head_k, n_head, n_cells);

        k = ggml_get_rows(ctx, k, idxs); // F32 [n_embd_head_k, n, n_head_kv]

        ggml_tensor * kn    = ggml_l2_norm(ctx, k, 1e-8f);
        ggml_tensor * total = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, kn, 1, 0, 2, 3)));

        layer_result res;

        // the sum of a column is the product of its key with the sum of all keys
        res.sums = ggml_mul_mat(ctx, kn, ggml_reshape_3d(ctx, total, cache.n_embd_head_k, 1, n_head));
        ggml_prec_set_acc(res.sums, GGML_PREC_F32);
        graph.output(res.sums);

        for (int64_t h = 0; h < n_head; h += n_once) {
            ggml_tensor * kn_h = ggml_view_3d(ctx, kn, kn->ne[0], n, std::min(n_once, n_head - h), kn->nb[1], kn->nb[2], h*kn->nb[2]);

            res.last.push_back(build_last_similar(ctx, kn_h, ramp, itself));
            graph.output(res.last.back().first);
            graph.output(res.last.back().second);
        }

        results.push_back(std::move(res));
    }

    graph.run([&]() {
        std::vector<int32_t> idx;
        for (int64_t h = 0; h < n_head; ++h) {
            idx.insert(idx.end(), order.begin(), order.end());
        }
        ggml_backend_tensor_set(idxs, idx.data(), 0, ggml_nbytes(idxs));

        std::vector<float> values(n);
        for (int64_t i = 0; i < n; ++i) {
            values[i] = (float) (i + 1);
        }
        ggml_backend_tensor_set(ramp, values.data(), 0, ggml_nbytes(ramp));

        std::fill(values.begin(), values.end(), 2.0f);
        ggml_backend_tensor_set(twos, values.data(), 0, ggml_nbytes(twos));
    });

    std::vector<float>   sums (n_head*n);
    std::vector<int32_t> last (n_head*n);
    std::vector<float>   value(n_head*n);
    std::vector<float>   twin (n);

    for (const auto & res : results) {
        ggml_backend_tensor_get(res.sums, sums.data(), 0, ggml_nbytes(res.sums));

        int64_t first = 0;
        for (const auto & [index, similarity] : res.last) {
            ggml_backend_tensor_get(index,      last .data() + first, 0, ggml_nbytes(index));
            ggml_backend_tensor_get(similarity, value.data() + first, 0, ggml_nbytes(similarity));
            first += ggml_nelements(index);
        }

        for (int64_t h = 0; h < n_head; ++h) {
            for (int64_t i = 0; i < n; ++i) {
                twin[i] = value[h*n + i] > KVL_SIMILAR ? (float) last[h*n + i] : -1.0f;
            }

            kvl_kernels().finish_redundancy(n, sums.data() + h*n, twin.data(), value.data() + h*n, redundancy);
            redundancy += n;
        }
    }
}

void kvl_redundancy(const kvl_cache & cache, int32_t seq_id, bool portable, float * redundancy, int32_t n_cells) {
    const auto     order  = kvl_cells_by_position(cache, seq_id);
    const int64_t  n      = order.size();
    const int64_t  n_rows = (int64_t) cache.n_layer*cache.n_head_kv;
    const uint32_t stream = cache.kv->get_stream(seq_id);

    std::vector<float> ordered(n_rows*n);

    if (!portable && kvl_is_on_cpu(cache)) {
        redundancy_on_cpu(cache, stream, order, ordered.data());
    } else {
        redundancy_portable(cache, stream, order, ordered.data(), n_cells);
    }

    std::fill(redundancy, redundancy + n_rows*n_cells, 0.0f);

    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
            redundancy[r*n_cells + order[i]] = ordered[r*n + i];
        }
    }
}
