// Scores: what the recorded queries attend to, and how much the keys repeat each other.

#include "kvlocal-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// the queries of one call and what they may see
struct query_set {
    std::vector<int32_t> rows; // [n_query] ring rows, by ascending position
    std::vector<float>   mask; // [n_query, n_cells] 0 or -inf
};

query_set select_queries(const kvl_cache & cache, int32_t seq_id, int32_t n_query, int32_t n_cells) {
    const auto & ring  = *kvl_access::ring(*cache.kv);
    const auto & cells = kvl_access::cells(*cache.kv, seq_id);

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
    q = ggml_permute(ctx, q, 0, 2, 1, 3);                // [n_embd_head_k, n_query, n_head]

    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);          // [n_cells, n_query, n_head]
    ggml_prec_set_acc(kq, GGML_PREC_F32);

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

// for each row of the unit keys, kn: F32 [n_embd, n, n_head_kv], by ascending position: the last other key with a
// similarity above 0.5 and that similarity; result: F32 [2, n, n_head_kv], -1 in the first place if there is none
constexpr float SIMILAR = 0.5f;

void find_last_similar(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);

    const ggml_tensor * kn = dst->src[0];

    const int64_t d = kn->ne[0];
    const int64_t n = kn->ne[1];

    // most keys have a twin among the recent ones, so a search from the end stops early
    constexpr int64_t B = 8;

    for (int64_t r = ith; r < n*kn->ne[2]; r += nth) {
        const int64_t h = r/n;
        const int64_t i = r%n;

        const float * keys = (const float *) ((const char *) kn->data + h*kn->nb[2]);
        const float * ki   = keys + i*d;

        float * out = (float *) ((char *) dst->data + i*dst->nb[1] + h*dst->nb[2]);

        out[0] = -1.0f;
        out[1] =  0.0f;

        for (int64_t j1 = n; j1 > 0 && out[0] < 0.0f; j1 -= B) {
            const int64_t j0 = std::max<int64_t>(0, j1 - B);

            float sim[B];
            for (int64_t j = j0; j < j1; ++j) {
                const float * kj = keys + j*d;

                float acc[16] = {};
                int64_t c = 0;
                for (; c + 16 <= d; c += 16) {
                    for (int64_t t = 0; t < 16; ++t) {
                        acc[t] += ki[c + t]*kj[c + t];
                    }
                }
                float sum = 0.0f;
                for (int64_t t = 0; t < 16; ++t) {
                    sum += acc[t];
                }
                for (; c < d; ++c) {
                    sum += ki[c]*kj[c];
                }
                sim[j - j0] = sum;
            }

            for (int64_t j = j1 - 1; j >= j0; --j) {
                if (j != i && sim[j - j0] > SIMILAR) {
                    out[0] = (float) j;
                    out[1] = sim[j - j0];
                    break;
                }
            }
        }
    }
}

// the same for one head in plain ggml operations, for backends without custom ones
// kn: [n_embd, n], order: [n] 1, 2, .. n, twos: [n] -> index I32 [n], similarity F32 [1, n]
std::pair<ggml_tensor *, ggml_tensor *> build_last_similar(ggml_context * ctx, ggml_tensor * kn, ggml_tensor * order, ggml_tensor * twos) {
    const int64_t n = kn->ne[1];

    ggml_tensor * sim = ggml_mul_mat(ctx, kn, kn); // [n, n]
    ggml_prec_set_acc(sim, GGML_PREC_F32);

    sim = ggml_sub(ctx, sim, ggml_diag(ctx, twos)); // no key is its own twin

    ggml_tensor * similar = ggml_step(ctx, ggml_scale_bias(ctx, sim, 1.0f, -SIMILAR));
    ggml_tensor * last    = ggml_argmax(ctx, ggml_mul(ctx, similar, order)); // I32 [n]

    ggml_tensor * value = ggml_get_rows(ctx, ggml_reshape_3d(ctx, sim, 1, n, n), ggml_reshape_2d(ctx, last, 1, n)); // [1, 1, n]

    return { last, value };
}

} // namespace

void kvl_scores(const kvl_cache & cache, int32_t seq_id, int32_t n_query, float * scores, int32_t n_cells) {
    const query_set queries = select_queries(cache, seq_id, n_query, n_cells);

    const int64_t  n_rows  = queries.rows.size();
    const int64_t  n_group = cache.n_head/cache.n_head_kv;
    const uint32_t stream  = cache.kv->get_stream(seq_id);

    kvl_graph graph(cache, cache.n_layer*(24 + 6*n_group) + 64);

    auto * ctx = graph.ctx();

    ggml_tensor * rows = graph.input(GGML_TYPE_I32, n_rows);
    ggml_tensor * mask = graph.input(GGML_TYPE_F32, n_cells, n_rows);

    std::vector<ggml_tensor *> results;

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        ggml_tensor * w = build_weights(cache, ctx, i, stream, rows, mask, n_cells);

        // split the heads into groups and fold each group by max(m, a) = m + relu(a - m)
        w = ggml_reshape_3d(ctx, w, n_cells*n_rows, n_group, cache.n_head_kv);

        ggml_tensor * m = nullptr;
        for (int64_t g = 0; g < n_group; ++g) {
            ggml_tensor * a = ggml_view_3d(ctx, w, w->ne[0], 1, w->ne[2], w->nb[1], w->nb[2], g*w->nb[1]);
            m = m ? ggml_add(ctx, m, ggml_relu(ctx, ggml_sub(ctx, a, m))) : ggml_cont(ctx, a);
        }

        m = ggml_reshape_3d(ctx, m, n_cells, n_rows, cache.n_head_kv);

        results.push_back(build_mean_over_queries(ctx, m)); // [1, n_cells, n_head_kv]
        graph.output(results.back());
    }

    graph.run([&]() {
        ggml_backend_tensor_set(rows, queries.rows.data(), 0, ggml_nbytes(rows));
        ggml_backend_tensor_set(mask, queries.mask.data(), 0, ggml_nbytes(mask));
    });

    const size_t n_out = (size_t) cache.n_head_kv*n_cells;

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        ggml_backend_tensor_get(results[i], scores + i*n_out, 0, n_out*sizeof(float));
    }
}

void kvl_attention_map(const kvl_cache & cache, int32_t seq_id, int32_t n_query, const int32_t * layers, int32_t n_chosen, float * map, int32_t n_cells) {
    const query_set queries = select_queries(cache, seq_id, n_query, n_cells);

    const int64_t  n_rows = queries.rows.size();
    const uint32_t stream = cache.kv->get_stream(seq_id);

    kvl_graph graph(cache, 24*n_chosen + 64);

    auto * ctx = graph.ctx();

    ggml_tensor * rows = graph.input(GGML_TYPE_I32, n_rows);
    ggml_tensor * mask = graph.input(GGML_TYPE_F32, n_cells, n_rows);

    std::vector<ggml_tensor *> results;

    for (int32_t i = 0; i < n_chosen; ++i) {
        ggml_tensor * w = build_weights(cache, ctx, layers[i], stream, rows, mask, n_cells);

        w = ggml_reshape_3d(ctx, w, n_cells*n_rows, cache.n_head, 1);

        results.push_back(build_mean_over_queries(ctx, w)); // [1, n_cells*n_query]
        graph.output(results.back());
    }

    graph.run([&]() {
        ggml_backend_tensor_set(rows, queries.rows.data(), 0, ggml_nbytes(rows));
        ggml_backend_tensor_set(mask, queries.mask.data(), 0, ggml_nbytes(mask));
    });

    const size_t n_out = (size_t) n_rows*n_cells;

    for (int32_t i = 0; i < n_chosen; ++i) {
        ggml_backend_tensor_get(results[i], map + i*n_out, 0, n_out*sizeof(float));
    }
}

void kvl_redundancy(const kvl_cache & cache, int32_t seq_id, bool dense, float * redundancy, int32_t n_cells) {
    const auto & layers = kvl_access::layers(*cache.kv);

    const auto     order  = kvl_cells_by_position(cache, seq_id);
    const int64_t  n      = order.size();
    const int64_t  n_head = cache.n_head_kv;
    const uint32_t stream = cache.kv->get_stream(seq_id);

    // custom operations run on the CPU only
    for (const auto & layer : layers) {
        dense = dense || !ggml_backend_buffer_is_host(layer.k->buffer);
    }

    kvl_graph graph(cache, cache.n_layer*(24 + (dense ? 20*n_head : 0)) + 64);

    auto * ctx = graph.ctx();

    ggml_tensor * idxs = graph.input(GGML_TYPE_I32, n, n_head);
    ggml_tensor * ramp = dense ? graph.input(GGML_TYPE_F32, n) : nullptr;
    ggml_tensor * twos = dense ? graph.input(GGML_TYPE_F32, n) : nullptr;

    struct result {
        ggml_tensor * sums;   // F32 [n, 1, n_head_kv] column sums of the whole similarity matrix
        ggml_tensor * self;   // F32 [1, n, n_head_kv] its diagonal
        ggml_tensor * last;   // F32 [2, n, n_head_kv], unless dense

        std::vector<std::pair<ggml_tensor *, ggml_tensor *>> last_dense; // per head
    };

    std::vector<result> results;

    for (const auto & layer : layers) {
        ggml_tensor * k = kvl_view_heads(ctx, layer.k_stream[stream], cache.n_embd_head_k, n_head, n_cells);

        ggml_tensor * kn = ggml_l2_norm(ctx, ggml_get_rows(ctx, k, idxs), 1e-8f); // [n_embd_head_k, n, n_head_kv]

        // the sum of a column is the product of its key with the sum of all keys: no matrix is needed for it
        ggml_tensor * total = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, kn, 1, 0, 2, 3)));
        total = ggml_reshape_3d(ctx, total, cache.n_embd_head_k, 1, n_head);

        result res = {};

        res.sums = ggml_mul_mat(ctx, kn, total);
        ggml_prec_set_acc(res.sums, GGML_PREC_F32);
        graph.output(res.sums);

        res.self = ggml_sum_rows(ctx, ggml_sqr(ctx, kn));
        graph.output(res.self);

        if (dense) {
            for (int64_t h = 0; h < n_head; ++h) {
                ggml_tensor * kn_h = ggml_view_2d(ctx, kn, kn->ne[0], n, kn->nb[1], h*kn->nb[2]);

                res.last_dense.push_back(build_last_similar(ctx, kn_h, ramp, twos));
                graph.output(res.last_dense.back().first);
                graph.output(res.last_dense.back().second);
            }
        } else {
            ggml_tensor * args[] = { kn };
            res.last = ggml_custom_4d(ctx, GGML_TYPE_F32, 2, n, n_head, 1, args, 1, find_last_similar, GGML_N_TASKS_MAX, nullptr);
            graph.output(res.last);
        }

        results.push_back(std::move(res));
    }

    graph.run([&]() {
        std::vector<int32_t> idx;
        for (int64_t h = 0; h < n_head; ++h) {
            idx.insert(idx.end(), order.begin(), order.end());
        }
        ggml_backend_tensor_set(idxs, idx.data(), 0, ggml_nbytes(idxs));

        if (dense) {
            std::vector<float> values(n);
            for (int64_t i = 0; i < n; ++i) {
                values[i] = (float) (i + 1);
            }
            ggml_backend_tensor_set(ramp, values.data(), 0, ggml_nbytes(ramp));

            std::fill(values.begin(), values.end(), 2.0f);
            ggml_backend_tensor_set(twos, values.data(), 0, ggml_nbytes(twos));
        }
    });

    std::fill(redundancy, redundancy + (size_t) cache.n_layer*n_head*n_cells, 0.0f);

    std::vector<float>   sums(n*n_head);
    std::vector<float>   self(n*n_head);
    std::vector<float>   last(2*n*n_head);
    std::vector<int32_t> last_idx(n);
    std::vector<float>   last_val(n);

    for (int32_t il = 0; il < cache.n_layer; ++il) {
        const auto & res = results[il];

        ggml_backend_tensor_get(res.sums, sums.data(), 0, ggml_nbytes(res.sums));
        ggml_backend_tensor_get(res.self, self.data(), 0, ggml_nbytes(res.self));

        if (!dense) {
            ggml_backend_tensor_get(res.last, last.data(), 0, ggml_nbytes(res.last));
        }

        for (int64_t h = 0; h < n_head; ++h) {
            float * mean = sums.data() + h*n;

            for (int64_t i = 0; i < n; ++i) {
                mean[i] -= self[h*n + i];
            }

            if (dense) {
                ggml_backend_tensor_get(res.last_dense[h].first,  last_idx.data(), 0, n*sizeof(int32_t));
                ggml_backend_tensor_get(res.last_dense[h].second, last_val.data(), 0, n*sizeof(float));
            }

            for (int64_t i = 0; i < n; ++i) {
                const int64_t j = dense ? last_idx[i] : (int64_t) last[2*(h*n + i)];
                const float   s = dense ? last_val[i] : last[2*(h*n + i) + 1];

                if (s > SIMILAR) {
                    mean[j] -= s;
                }
            }

            float * out = redundancy + ((size_t) il*n_head + h)*n_cells;

            // softmax over the cells
            float mean_max = -INFINITY;
            for (int64_t i = 0; i < n; ++i) {
                mean[i] /= n;
                mean_max = std::max(mean_max, mean[i]);
            }
            float sum = 0.0f;
            for (int64_t i = 0; i < n; ++i) {
                mean[i] = expf(mean[i] - mean_max);
                sum += mean[i];
            }
            for (int64_t i = 0; i < n; ++i) {
                out[order[i]] = mean[i]/sum;
            }
        }
    }
}
