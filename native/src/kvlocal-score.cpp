// Scores: what the recorded queries attend to, and how much the keys repeat each other.

#include "kvlocal-impl.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

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

// ggml's fast matrix products want a multiple of this; the capacity of a stream is one, and masked cells weigh nothing
int32_t pad_cells(int32_t n_cells) {
    return GGML_PAD(n_cells, 16);
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

// w: [n_cells, n_query, n_head] -> [1, n_cells, n_head_kv]: maximum over each group of heads, mean over the queries
ggml_tensor * build_fold(ggml_context * ctx, ggml_tensor * w, int64_t n_head_kv) {
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

    return build_mean_over_queries(ctx, ggml_reshape_3d(ctx, m, n_cells, n_query, n_head_kv));
}

// the share [first, last) of n items that thread ith of nth works on
std::pair<int64_t, int64_t> share_of(int64_t n, int ith, int nth) {
    return { n*ith/nth, n*(ith + 1)/nth };
}

// build_fold in one pass over the weights
// dst: F32 [1, n_cells, n_head_kv]
void fold(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);

    const ggml_tensor * w = dst->src[0];

    const int64_t n_cells   = w->ne[0];
    const int64_t n_query   = w->ne[1];
    const int64_t n_head_kv = dst->ne[2];
    const int64_t n_group   = w->ne[2]/n_head_kv;

    const auto [j0, j1] = share_of(n_cells, ith, nth);

    // a stretch of cells at a time stays in registers and in the first cache
    constexpr int64_t B = 64;

    for (int64_t h = 0; h < n_head_kv; ++h) {
        float * out = (float *) dst->data + h*n_cells;

        for (int64_t j = j0; j < j1; j += B) {
            const int64_t n = std::min(B, j1 - j);

            float sum[B] = {};
            for (int64_t q = 0; q < n_query; ++q) {
                float m[B] = {}; // weights are never negative

                for (int64_t g = 0; g < n_group; ++g) {
                    const float * a = (const float *) w->data + ((h*n_group + g)*n_query + q)*n_cells + j;
                    for (int64_t t = 0; t < n; ++t) {
                        m[t] = a[t] > m[t] ? a[t] : m[t];
                    }
                }
                for (int64_t t = 0; t < n; ++t) {
                    sum[t] += m[t];
                }
            }
            for (int64_t t = 0; t < n; ++t) {
                out[j + t] = sum[t]/n_query;
            }
        }
    }
}

constexpr float SIMILAR = 0.5f;

// what is left to do once the twins are known, for the n keys of one head by ascending position
// sums: [n] column sums of the similarity matrix, twin: [n] index or -1, value: [n] similarity to the twin; out: [n]
void finish_redundancy(int64_t n, float * sums, const float * twin, const float * value, float * out) {
    for (int64_t i = 0; i < n; ++i) {
        // the diagonal of the similarity matrix: 1, or 0 for a key that is zero
        sums[i] -= sums[i] == 0.0f ? 0.0f : 1.0f;
    }
    for (int64_t i = 0; i < n; ++i) {
        if (twin[i] >= 0.0f) {
            sums[(int64_t) twin[i]] -= value[i];
        }
    }

    float mean_max = -INFINITY;
    for (int64_t i = 0; i < n; ++i) {
        sums[i] /= n;
        mean_max = std::max(mean_max, sums[i]);
    }

    float total = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        out[i] = expf(sums[i] - mean_max);
        total += out[i];
    }
    for (int64_t i = 0; i < n; ++i) {
        out[i] /= total;
    }
}

// ROWS keys meet COLUMNS others at a time, as many as the registers hold
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
constexpr int64_t ROWS  = 8;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
constexpr int64_t ROWS  = 4;
#else
constexpr int64_t LANES = 4;
constexpr int64_t ROWS  = 8;
#endif
constexpr int64_t COLUMNS = 2*LANES;

static_assert(COLUMNS%ROWS == 0, "the rows of one step are in one panel");

typedef float vector __attribute__((vector_size(LANES*sizeof(float))));

vector load(const float * p) {
    vector v;
    memcpy(&v, p, sizeof(v));
    return v;
}

bool any_similar(vector a, vector b) {
    const auto similar = (a > SIMILAR) | (b > SIMILAR);

    uint64_t words[sizeof(similar)/sizeof(uint64_t)];
    memcpy(words, &similar, sizeof(similar));

    uint64_t any = 0;
    for (const uint64_t word : words) {
        any |= word;
    }

    return any != 0;
}

void half_to_float(const void * x, float * y, int64_t n) {
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) x, y, n);
}

// the keys of one head, by ascending position, and for each of them its twin: the last other key that is similar to it
struct twin_search {
    const int64_t d;
    const int64_t n;
    const int64_t n_panel;

    std::vector<vector> unit; // F32 [n_panel, d, COLUMNS] unit keys, so that one meets a panel of others in vectors; zero from the n-th on
    std::vector<float> twin;  // [n] index, -1: none
    std::vector<float> value; // [n] similarity to the twin

    std::vector<float> row;   // [d]

    twin_search(int64_t d, int64_t n) : d(d), n(n), n_panel((n + COLUMNS - 1)/COLUMNS), unit(n_panel*d*COLUMNS/LANES), twin(n), value(n), row(d) {}

    const float * panel(int64_t p) const { return (const float *) unit.data() + p*d*COLUMNS; }

    // k: [n_embd_head, n_cells, n_head_kv] view of the cache, order: [n] cells
    void set_keys(const ggml_tensor * k, int64_t head, const int32_t * order) {
        // the backend's own conversion uses the vector unit
        const auto to_float = k->type == GGML_TYPE_F16 ? half_to_float : ggml_get_type_traits(k->type)->to_float;

        for (int64_t i = 0; i < n; ++i) {
            const char  * stored = (const char *) k->data + order[i]*k->nb[1] + head*k->nb[2];
            const float * key    = (const float *) stored;

            if (to_float) {
                to_float(stored, row.data(), d);
                key = row.data();
            }

            float norm2[LANES] = {};
            for (int64_t c = 0; c + LANES <= d; c += LANES) {
                for (int64_t l = 0; l < LANES; ++l) {
                    norm2[l] += key[c + l]*key[c + l];
                }
            }
            for (int64_t c = d - d%LANES; c < d; ++c) {
                norm2[0] += key[c]*key[c];
            }
            const float scale = 1.0f/std::max(sqrtf(std::accumulate(norm2, norm2 + LANES, 0.0f)), 1e-8f);

            float * out = (float *) unit.data() + i/COLUMNS*d*COLUMNS + i%COLUMNS;
            for (int64_t c = 0; c < d; ++c) {
                out[c*COLUMNS] = key[c]*scale;
            }
        }
    }

    void find_twins() {
        std::fill(twin .begin(), twin .end(), -1.0f);
        std::fill(value.begin(), value.end(),  0.0f);

        for (int64_t i = 0; i < n; i += ROWS) {
            const float * keys = panel(i/COLUMNS) + i%COLUMNS;

            int64_t n_open = std::min(ROWS, n - i);

            // from the end: where keys have a twin among the recent ones the search is short
            for (int64_t p = n_panel - 1; p >= 0 && n_open > 0; --p) {
                const float * others = panel(p);

                vector acc[ROWS][2] = {};

                for (int64_t c = 0; c < d; ++c) {
                    const vector x0 = load(others + c*COLUMNS);
                    const vector x1 = load(others + c*COLUMNS + LANES);

                    for (int64_t r = 0; r < ROWS; ++r) {
                        acc[r][0] += keys[c*COLUMNS + r]*x0;
                        acc[r][1] += keys[c*COLUMNS + r]*x1;
                    }
                }

                for (int64_t r = 0; r < std::min(ROWS, n - i); ++r) {
                    if (twin[i + r] >= 0.0f || !any_similar(acc[r][0], acc[r][1])) {
                        continue;
                    }
                    for (int64_t t = COLUMNS - 1; t >= 0 && twin[i + r] < 0.0f; --t) {
                        const float x = acc[r][t/LANES][t%LANES];

                        if (x > SIMILAR && p*COLUMNS + t != i + r) {
                            twin [i + r] = (float) (p*COLUMNS + t);
                            value[i + r] = x;
                            n_open--;
                        }
                    }
                }
            }
        }
    }

    // out: [n] softmax of the mean similarity to the other keys, without the entries of twins
    void redundancy(float * out) {
        // the sum of a column of the similarity matrix is the product of its key with the sum of all keys
        std::vector<float> total(d);
        for (int64_t p = 0; p < n_panel; ++p) {
            for (int64_t c = 0; c < d; ++c) {
                const vector x = load(panel(p) + c*COLUMNS) + load(panel(p) + c*COLUMNS + LANES);
                for (int64_t t = 0; t < LANES; ++t) {
                    total[c] += x[t];
                }
            }
        }

        std::vector<float> sums(n_panel*COLUMNS);
        for (int64_t p = 0; p < n_panel; ++p) {
            for (int64_t c = 0; c < d; ++c) {
                for (int64_t t = 0; t < COLUMNS; ++t) {
                    sums[p*COLUMNS + t] += panel(p)[c*COLUMNS + t]*total[c];
                }
            }
        }

        finish_redundancy(n, sums.data(), twin.data(), value.data(), out);
    }
};

constexpr int64_t LAYERS_AT_A_TIME = 8; // a custom operation has room for ten sources

// src: I32 [n] cells by ascending position, up to LAYERS_AT_A_TIME views of stored keys [n_embd_head, n_cells, n_head_kv]
// dst: F32 [n, n_head_kv, n_layer] redundancy
void redundancy_of_layers(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);

    const int64_t n      = dst->ne[0];
    const int64_t n_head = dst->ne[1];

    const int32_t * order = (const int32_t *) dst->src[0]->data;

    twin_search search(dst->src[1]->ne[0], n);

    for (int64_t u = ith; u < n_head*dst->ne[2]; u += nth) {
        search.set_keys(dst->src[1 + u/n_head], u%n_head, order);
        search.find_twins();
        search.redundancy((float *) dst->data + u*n);
    }
}

// the same for one head in ggml's own operations
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

// the keys of one layer, compared in ggml's own operations
struct portable_result {
    ggml_tensor * sums; // F32 [n, 1, n_head_kv] column sums of the similarity matrix
    std::vector<std::pair<ggml_tensor *, ggml_tensor *>> last; // per head, see build_last_similar

    // out: [n] redundancy of the keys of head h
    void read(int64_t h, std::vector<float> & out) const {
        const int64_t n = out.size();

        std::vector<float>   column(n);
        std::vector<int32_t> index(n);
        std::vector<float>   value(n);

        ggml_backend_tensor_get(sums,           column.data(), h*n*sizeof(float), n*sizeof(float));
        ggml_backend_tensor_get(last[h].first,  index.data(),  0, n*sizeof(int32_t));
        ggml_backend_tensor_get(last[h].second, value.data(),  0, n*sizeof(float));

        std::vector<float> twin(n);
        for (int64_t i = 0; i < n; ++i) {
            twin[i] = value[i] > SIMILAR ? (float) index[i] : -1.0f;
        }

        finish_redundancy(n, column.data(), twin.data(), value.data(), out.data());
    }
};

} // namespace

void kvl_scores(const kvl_cache & cache, int32_t seq_id, int32_t n_query, bool portable, float * scores, int32_t n_cells) {
    const int32_t   n_pad   = pad_cells(n_cells);
    const query_set queries = select_queries(cache, seq_id, n_query, n_pad);

    const int64_t  n_rows = queries.rows.size();
    const uint32_t stream = cache.kv->get_stream(seq_id);

    portable = portable || !kvl_is_on_cpu(cache);

    kvl_graph graph(cache, cache.n_layer*(24 + (portable ? 6*cache.n_head/cache.n_head_kv : 0)) + 64);

    auto * ctx = graph.ctx();

    ggml_tensor * rows = graph.input(GGML_TYPE_I32, n_rows);
    ggml_tensor * mask = graph.input(GGML_TYPE_F32, n_pad, n_rows);

    std::vector<ggml_tensor *> results;

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        ggml_tensor * w = build_weights(cache, ctx, i, stream, rows, mask, n_pad);

        results.push_back(portable
            ? build_fold(ctx, w, cache.n_head_kv)
            : ggml_custom_4d(ctx, GGML_TYPE_F32, 1, n_pad, cache.n_head_kv, 1, &w, 1, fold, GGML_N_TASKS_MAX, nullptr));
        graph.output(results.back());
    }

    graph.run([&]() {
        ggml_backend_tensor_set(rows, queries.rows.data(), 0, ggml_nbytes(rows));
        ggml_backend_tensor_set(mask, queries.mask.data(), 0, ggml_nbytes(mask));
    });

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        for (int32_t h = 0; h < cache.n_head_kv; ++h) {
            ggml_backend_tensor_get(results[i], scores, h*n_pad*sizeof(float), n_cells*sizeof(float));
            scores += n_cells;
        }
    }
}

void kvl_attention_map(const kvl_cache & cache, int32_t seq_id, int32_t n_query, const int32_t * layers, int32_t n_chosen, float * map, int32_t n_cells) {
    const int32_t   n_pad   = pad_cells(n_cells);
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
        for (int64_t q = 0; q < n_rows; ++q) {
            ggml_backend_tensor_get(results[i], map, q*n_pad*sizeof(float), n_cells*sizeof(float));
            map += n_cells;
        }
    }
}

void kvl_redundancy(const kvl_cache & cache, int32_t seq_id, bool portable, float * redundancy, int32_t n_cells) {
    const auto & layers = kvl_access::layers(*cache.kv);

    const auto     order  = kvl_cells_by_position(cache, seq_id);
    const int64_t  n      = order.size();
    const int64_t  n_head = cache.n_head_kv;
    const uint32_t stream = cache.kv->get_stream(seq_id);

    portable = portable || !kvl_is_on_cpu(cache);

    kvl_graph graph(cache, cache.n_layer*(24 + (portable ? 20*n_head : 0)) + 64);

    auto * ctx = graph.ctx();

    ggml_tensor * idxs = graph.input(GGML_TYPE_I32, n, n_head);
    ggml_tensor * ramp = portable ? graph.input(GGML_TYPE_F32, n) : nullptr;
    ggml_tensor * twos = portable ? graph.input(GGML_TYPE_F32, n) : nullptr;

    std::vector<ggml_tensor *> keys; // [n_embd_head_k, n_cells, n_head_kv] per layer, as stored

    for (const auto & layer : layers) {
        keys.push_back(kvl_view_heads(ctx, layer.k_stream[stream], cache.n_embd_head_k, n_head, n_cells));
    }

    std::vector<ggml_tensor *> results; // unless portable: F32 [n, n_head_kv, up to LAYERS_AT_A_TIME]

    std::vector<portable_result> portable_results;

    if (portable) {
        for (ggml_tensor * k : keys) {
            portable_result res;

            k = ggml_get_rows(ctx, k, idxs); // F32 [n_embd_head_k, n, n_head_kv]

            ggml_tensor * kn    = ggml_l2_norm(ctx, k, 1e-8f);
            ggml_tensor * total = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, kn, 1, 0, 2, 3)));

            // the sum of a column is the product of its key with the sum of all keys
            res.sums = ggml_mul_mat(ctx, kn, ggml_reshape_3d(ctx, total, cache.n_embd_head_k, 1, n_head));
            ggml_prec_set_acc(res.sums, GGML_PREC_F32);
            graph.output(res.sums);

            for (int64_t h = 0; h < n_head; ++h) {
                ggml_tensor * kn_h = ggml_view_2d(ctx, kn, kn->ne[0], n, kn->nb[1], h*kn->nb[2]);

                res.last.push_back(build_last_similar(ctx, kn_h, ramp, twos));
                graph.output(res.last.back().first);
                graph.output(res.last.back().second);
            }

            portable_results.push_back(std::move(res));
        }
    } else {
        for (int64_t i = 0; i < cache.n_layer; i += LAYERS_AT_A_TIME) {
            const int64_t n_chosen = std::min(LAYERS_AT_A_TIME, cache.n_layer - i);

            std::vector<ggml_tensor *> args = { idxs };
            args.insert(args.end(), keys.begin() + i, keys.begin() + i + n_chosen);

            results.push_back(ggml_custom_4d(ctx, GGML_TYPE_F32, n, n_head, n_chosen, 1, args.data(), args.size(), redundancy_of_layers, GGML_N_TASKS_MAX, nullptr));
            graph.output(results.back());
        }
    }

    graph.run([&]() {
        std::vector<int32_t> idx;
        for (int64_t h = 0; h < n_head; ++h) {
            idx.insert(idx.end(), order.begin(), order.end());
        }
        ggml_backend_tensor_set(idxs, idx.data(), 0, ggml_nbytes(idxs));

        if (portable) {
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

    std::vector<float> ordered(n); // of one head

    for (int64_t il = 0; il < cache.n_layer; ++il) {
        for (int64_t h = 0; h < n_head; ++h) {
            if (portable) {
                portable_results[il].read(h, ordered);
            } else {
                const size_t offset = (il%LAYERS_AT_A_TIME*n_head + h)*n*sizeof(float);

                ggml_backend_tensor_get(results[il/LAYERS_AT_A_TIME], ordered.data(), offset, n*sizeof(float));
            }

            for (int64_t i = 0; i < n; ++i) {
                redundancy[order[i]] = ordered[i];
            }
            redundancy += n_cells;
        }
    }
}
