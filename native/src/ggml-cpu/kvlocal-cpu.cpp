// Scores and redundancy on the CPU: one pass per head through the caches of a core, where ggml's operations take many through memory.

#include "kvlocal-cpu.h"
#include "kvlocal-panels.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace {

void half_to_float(const void * x, float * y, int64_t n) {
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) x, y, n);
}

// the keys of one head in panels, so that one vector meets a panel of keys at once
struct key_panels {
    const int64_t d;
    const int64_t n;
    const int64_t n_panel;

    std::vector<vector> data; // F32 [n_panel, d, COLUMNS], zero from the n-th key on
    std::vector<float>  key;  // [d]

    key_panels(int64_t d, int64_t n) : d(d), n(n), n_panel((n + COLUMNS - 1)/COLUMNS), data(n_panel*d*2), key(d) {}

    const float * panel(int64_t p) const { return (const float *) data.data() + p*d*COLUMNS; }

    // the n keys of cells order[0], order[1], ..., scaled to unit length
    void set_unit(const kvl_stored_keys & k, int64_t head, const int32_t * order) {
        // the backend's own conversion uses the vector unit
        const auto to_float = k.type == GGML_TYPE_F16 ? half_to_float : ggml_get_type_traits(k.type)->to_float;

        for (int64_t i = 0; i < n; ++i) {
            const char  * stored = k.at(order[i], head);
            const float * x      = (const float *) stored;

            if (to_float) {
                to_float(stored, key.data(), d);
                x = key.data();
            }

            float * out = (float *) data.data() + i/COLUMNS*d*COLUMNS + i%COLUMNS;

            const float scale = 1.0f/std::max(length(x), 1e-8f);
            for (int64_t c = 0; c < d; ++c) {
                out[c*COLUMNS] = x[c]*scale;
            }
        }
    }

private:
    float length(const float * x) const {
        vector norm2 = {};
        for (int64_t c = 0; c + LANES <= d; c += LANES) {
            norm2 += load(x + c)*load(x + c);
        }
        float rest = 0.0f;
        for (int64_t c = d - d%LANES; c < d; ++c) {
            rest += x[c]*x[c];
        }
        return sqrtf(sum_of(norm2) + rest);
    }
};

bool any_similar(vector a, vector b) {
    const auto similar = (a > KVL_SIMILAR) | (b > KVL_SIMILAR);

    uint64_t words[sizeof(similar)/sizeof(uint64_t)];
    memcpy(words, &similar, sizeof(similar));

    uint64_t any = 0;
    for (const uint64_t word : words) {
        any |= word;
    }

    return any != 0;
}

// for each key of one head, by ascending position, its twin: the last other key that is similar to it
struct twin_search {
    const int64_t n;

    key_panels keys;

    std::vector<float> twin;  // [n] index, -1: none
    std::vector<float> value; // [n] similarity to the twin

    twin_search(int64_t d, int64_t n) : n(n), keys(d, n), twin(n), value(n) {}

    void find_twins() {
        std::fill(twin .begin(), twin .end(), -1.0f);
        std::fill(value.begin(), value.end(),  0.0f);

        vector acc[ROWS][2];

        for (int64_t i = 0; i < n; i += ROWS) {
            const int64_t n_rows = std::min(ROWS, n - i);

            int64_t n_open = n_rows;

            // from the end: where keys have a twin among the recent ones the search is short
            for (int64_t p = keys.n_panel - 1; p >= 0 && n_open > 0; --p) {
                multiply_panel(keys.panel(p), keys.d, keys.panel(i/COLUMNS) + i%COLUMNS, COLUMNS, acc);

                for (int64_t r = 0; r < n_rows; ++r) {
                    if (twin[i + r] >= 0.0f || !any_similar(acc[r][0], acc[r][1])) {
                        continue;
                    }
                    for (int64_t t = COLUMNS - 1; t >= 0 && twin[i + r] < 0.0f; --t) {
                        const float x = acc[r][t/LANES][t%LANES];

                        if (x > KVL_SIMILAR && p*COLUMNS + t != i + r) {
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
    void redundancy(float * out) const {
        const int64_t d = keys.d;

        // the sum of a column of the similarity matrix is the product of its key with the sum of all keys
        std::vector<float> total(d);
        for (int64_t p = 0; p < keys.n_panel; ++p) {
            for (int64_t c = 0; c < d; ++c) {
                total[c] += sum_of(load(keys.panel(p) + c*COLUMNS) + load(keys.panel(p) + c*COLUMNS + LANES));
            }
        }

        std::vector<float> sums(keys.n_panel*COLUMNS);
        for (int64_t p = 0; p < keys.n_panel; ++p) {
            for (int64_t c = 0; c < d; ++c) {
                for (int64_t t = 0; t < COLUMNS; ++t) {
                    sums[p*COLUMNS + t] += keys.panel(p)[c*COLUMNS + t]*total[c];
                }
            }
        }

        kvl_finish_redundancy(n, sums.data(), twin.data(), value.data(), out);
    }
};

} // namespace

void kvl_finish_redundancy(int64_t n, float * sums, const float * twin, const float * value, float * out) {
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

void kvl_cpu_scores::compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & task = *(const kvl_cpu_scores *) userdata;

    const int64_t n_cells = dst->ne[0];

    attention att(task, n_cells);

    std::vector<float> out(att.n_column);

    for (int64_t u = ith; u < ggml_nrows(dst); u += nth) {
        att.run(u/task.n_head_kv, u%task.n_head_kv, out.data());

        memcpy((float *) dst->data + u*n_cells, out.data(), n_cells*sizeof(float));
    }
}

void kvl_cpu_redundancy::compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & task = *(const kvl_cpu_redundancy *) userdata;

    const int64_t n = dst->ne[0];

    twin_search search(task.n_embd_head, n);

    for (int64_t u = ith; u < ggml_nrows(dst); u += nth) {
        search.keys.set_unit(task.keys[u/task.n_head_kv], u%task.n_head_kv, task.order.data());
        search.find_twins();
        search.redundancy((float *) dst->data + u*n);
    }
}

const kvl_cpu_kernels * kvl_get_cpu_kernels() {
    static const kvl_cpu_kernels kernels = {
        kvl_cpu_scores::compute,
        kvl_cpu_best_rows::compute,
        kvl_cpu_redundancy::compute,
        LOADS_HALF ? kvl_cpu_attention::compute : nullptr,
        kvl_fill_boxes,
        kvl_finish_redundancy,
    };
    return &kernels;
}
