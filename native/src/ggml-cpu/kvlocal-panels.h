// Panels of keys, which many vectors meet at once, and the attention of a group of query heads to the keys of their KV head.

#pragma once

#include "kvlocal-cpu.h"
#include "kvlocal-simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

// ROWS vectors meet COLUMNS others at a time, as many as the registers hold
constexpr int64_t ROWS    = LANES == 8 ? 4 : 8;
constexpr int64_t COLUMNS = 2*LANES;

static_assert(COLUMNS%ROWS == 0, "the rows of one step are in one panel");
static_assert(KVL_CPU_PAD%COLUMNS == 0, "masks reach to the end of the last panel");

// products of ROWS vectors with a panel of keys, F32 [d, COLUMNS]; component c of vector r is rows[c*stride + r]
void multiply_panel(const float * panel, int64_t d, const float * rows, int64_t stride, vector (&acc)[ROWS][2]) {
    for (int64_t r = 0; r < ROWS; ++r) {
        acc[r][0] = acc[r][1] = vector{};
    }
    for (int64_t c = 0; c < d; ++c) {
        const vector x0 = load(panel + c*COLUMNS);
        const vector x1 = load(panel + c*COLUMNS + LANES);

        for (int64_t r = 0; r < ROWS; ++r) {
            acc[r][0] += rows[c*stride + r]*x0;
            acc[r][1] += rows[c*stride + r]*x1;
        }
    }
}

// the softmax of each row, [n_row, stride] of which n numbers count, a multiple of LANES, and in the last row the largest of all
// mask: F32 [n] is added first, unless it is NULL
void softmax_largest(float * rows, int64_t n_row, int64_t stride, int64_t n, const float * mask) {
    for (int64_t r = 0; r < n_row; ++r) {
        float * x = rows + r*stride;

        vector top = vector{} - INFINITY;
        for (int64_t j = 0; j < n; j += LANES) {
            const vector v = mask ? load(x + j) + load(mask + j) : load(x + j);
            store(x + j, v);
            top = larger(top, v);
        }

        const float max = largest_of(top);

        vector sum = {};
        for (int64_t j = 0; j < n; j += LANES) {
            const vector e = exp_of(load(x + j) - max);
            store(x + j, e);
            sum += e;
        }

        const float share = 1.0f/sum_of(sum);
        for (int64_t j = 0; j < n; j += LANES) {
            const vector w = load(x + j)*share;
            store(x + j, r > 0 ? larger(w, load(x + j - stride)) : w);
        }
    }
}

// d numbers as they are stored
inline void to_floats(ggml_type type, const void * stored, float * key, int64_t d) {
    if (type == GGML_TYPE_F16 && LOADS_HALF && d%LANES == 0) {
        for (int64_t c = 0; c < d; c += LANES) {
            store(key + c, load_half((const char *) stored + c*sizeof(ggml_fp16_t)));
        }
    } else if (type == GGML_TYPE_F32) {
        memcpy(key, stored, d*sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(stored, key, d);
    }
}

// one panel of keys of a head, as they are read
struct key_panel {
    const int64_t d;
    const int64_t n_pad; // numbers of a key, padded

    std::vector<float> staged; // [COLUMNS, n_pad]
    std::vector<float> data;   // [n_pad, COLUMNS]

    explicit key_panel(int64_t d) : d(d), n_pad(GGML_PAD(d, LANES)), staged(COLUMNS*n_pad), data(n_pad*COLUMNS) {}

    // the keys of n cells from first on, or of order[first] and so on; zero behind them
    void set(const kvl_stored_keys & k, int64_t head, const int32_t * order, int64_t first, int64_t n) {
        for (int64_t i = 0; i < COLUMNS; ++i) {
            float * key = staged.data() + i*n_pad;

            if (i < n) {
                to_floats(k.type, k.at(order ? order[first + i] : first + i, head), key, d);
            } else {
                std::fill_n(key, d, 0.0f);
            }
        }

        vector block[LANES];

        for (int64_t i = 0; i < COLUMNS; i += LANES) {
            for (int64_t c = 0; c < n_pad; c += LANES) {
                for (int64_t t = 0; t < LANES; ++t) {
                    block[t] = load(staged.data() + (i + t)*n_pad + c);
                }
                transpose(block);
                for (int64_t t = 0; t < LANES; ++t) {
                    store(data.data() + (c + t)*COLUMNS + i, block[t]);
                }
            }
        }
    }
};

// attention of the queries of one group of heads to the keys of their KV head
struct attention {
    // about as many rows of weights as stay in the second cache
    static constexpr int64_t ROWS_AT_A_TIME = 48;

    const kvl_cpu_scores & task;

    const int64_t n_query;
    const int64_t n_group;
    const int64_t n_chunk;  // queries at a time
    const int64_t n_rows;   // of a chunk, padded
    const int64_t n_cells;
    const int64_t n_column; // cells, padded

    const int32_t * order = nullptr; // [n_cells] which cells they are, or the first ones

    std::vector<kvl_stretch> stretches; // of them

    key_panel keys;

    std::vector<float>  rows;    // [d, n_rows] queries of a chunk
    std::vector<vector> weights; // F32 [n_rows, n_column]

    attention(const kvl_cpu_scores & task, int64_t n_cells) :
        task(task),
        n_query (task.rows.size()),
        n_group (task.n_head/task.n_head_kv),
        n_chunk (std::max<int64_t>(1, ROWS_AT_A_TIME/n_group)),
        n_rows  (GGML_PAD(n_chunk*n_group, ROWS)),
        n_cells(n_cells),
        n_column(GGML_PAD(n_cells, COLUMNS)),
        stretches(task.stretches),
        keys(task.n_embd_head),
        rows(task.n_embd_head*n_rows),
        weights(n_rows*n_column/LANES) {}

    float * row(int64_t r) { return (float *) weights.data() + r*n_column; }

    // out: [n_column]
    void run(int64_t layer, int64_t head, float * out) {
        std::fill(out, out + n_column, 0.0f);

        for (int64_t q0 = 0; q0 < n_query; q0 += n_chunk) {
            const int64_t n = std::min(n_chunk, n_query - q0);

            for (size_t s = 0; s < stretches.size(); ++s) {
                set_rows(layer, head, q0, n, stretches[s].copy);
                multiply(layer, head, n, stretches[s].start, s + 1 < stretches.size() ? stretches[s + 1].start : n_column);
            }

            for (int64_t q = 0; q < n; ++q) {
                add(q0 + q, q*n_group, out);
            }
        }

        if (!task.largest) {
            for (int64_t j = 0; j < n_column; ++j) {
                out[j] /= n_query;
            }
        }
    }

    void set_rows(int64_t layer, int64_t head, int64_t q0, int64_t n, int64_t copy) {
        const int64_t d = task.n_embd_head;

        std::fill(rows.begin(), rows.end(), 0.0f);

        for (int64_t r = 0; r < n*n_group; ++r) {
            const float * q = task.queries[layer] + ((copy*n_query + task.rows[q0 + r/n_group])*task.n_head + head*n_group + r%n_group)*d;

            for (int64_t c = 0; c < d; ++c) {
                rows[c*n_rows + r] = q[c]*task.scales[layer];
            }
        }
    }

    // of the cells from first to end - 1
    void multiply(int64_t layer, int64_t head, int64_t n, int64_t first, int64_t end) {
        vector acc[ROWS][2];

        for (int64_t at = first/COLUMNS*COLUMNS; at < end; at += COLUMNS) {
            keys.set(task.keys[layer], head, order, at, n_cells - at);

            for (int64_t r0 = 0; r0 < n*n_group; r0 += ROWS) {
                multiply_panel(keys.data.data(), keys.d, rows.data() + r0, n_rows, acc);

                for (int64_t r = 0; r < ROWS; ++r) {
                    float * out = row(r0 + r) + at;

                    if (at >= first && at + COLUMNS <= end) {
                        store(out,         acc[r][0]);
                        store(out + LANES, acc[r][1]);
                        continue;
                    }
                    for (int64_t t = std::max(first - at, (int64_t) 0); t < std::min(end - at, COLUMNS); ++t) {
                        out[t] = acc[r][t/LANES][t%LANES];
                    }
                }
            }
        }
    }

    // softmax of the group's rows from r0 on, and their maximum to out
    void add(int64_t query, int64_t r0, float * out) {
        const float * mask = task.mask.data() + query*task.n_mask;

        softmax_largest(row(r0), n_group, n_column, n_column, mask);

        const float * x = row(r0 + n_group - 1);
        for (int64_t j = 0; j < n_column; j += LANES) {
            store(out + j, task.largest ? larger(load(out + j), load(x + j)) : load(out + j) + load(x + j));
        }
    }
};

} // namespace
