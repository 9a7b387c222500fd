// Attention of single tokens on the CPU: keys and values are read once for all query heads that share them.

#include "kvlocal-cpu.h"
#include "kvlocal-simd.h"

#include <cmath>

namespace {

constexpr int64_t BLOCK   = 64; // cells at a time
constexpr int     ROWS    = 4;  // query heads at a time
constexpr int     COLUMNS = LANES == 8 ? 2 : 4; // vectors of a value at a time

static_assert(BLOCK%LANES == 0, "a block consists of whole vectors");

constexpr uint16_t MASKED = 0xfc00; // -inf in half precision

// visible cells
struct block {
    int64_t n;
    int64_t cells[BLOCK]; // the last one is repeated behind the n-th
    float   bias [BLOCK]; // from the mask, and -inf behind the n-th
};

// softmax over a part of the cells, of one query head
struct state {
    static constexpr int64_t HEADER = kvl_cpu_attention::HEADER;

    float * data;

    float & max()    const { return data[0]; }
    float * sums()   const { return data + 16; } // [LANES] of e^(score - max)
    float * values() const { return data + HEADER; } // of e^(score - max) times a value

    void clear(int64_t d) const {
        std::fill(data, data + HEADER + d, 0.0f);
        max() = -INFINITY;
    }
};

// of several query heads
struct state_list {
    float * data;
    int64_t stride;

    state      operator[](int64_t i) const { return { data + i*stride }; }
    state_list operator+ (int64_t i) const { return { data + i*stride, stride }; }
};

// finds the cells that a token sees
struct reader {
    const uint16_t * mask;
    int64_t          n_kv;

    int64_t count(int64_t begin, int64_t end) const {
        int32_t res = 0;
        for (int64_t i = begin; i < end; ++i) {
            res += mask[i] != MASKED;
        }
        return res;
    }

    // where the visible cell with this number is
    int64_t find(int64_t number) const {
        int64_t begin = 0;
        while (begin + BLOCK <= n_kv) {
            const int64_t n = count(begin, begin + BLOCK);
            if (n > number) {
                break;
            }
            number -= n;
            begin  += BLOCK;
        }
        for (; number > 0 || mask[begin] == MASKED; ++begin) {
            number -= mask[begin] != MASKED;
        }
        return begin;
    }

    // up to n visible cells from begin on; returns where to go on
    int64_t fill(block & b, int64_t begin, int64_t n) const {
        b.n = 0;
        for (; b.n < n; ++begin) {
            b.cells[b.n] = begin;
            b.n += mask[begin] != MASKED;
        }
        for (int64_t i = 0; i < b.n; ++i) {
            const uint16_t bits = mask[b.cells[i]];
            b.bias[i] = bits == 0 ? 0.0f : ggml_fp16_to_fp32(bits);
        }
        std::fill(b.cells + b.n, b.cells + BLOCK, b.cells[b.n - 1]);
        std::fill(b.bias  + b.n, b.bias  + BLOCK, -INFINITY);

        return begin;
    }
};

// keys or values of one KV head
struct stored {
    const char * data;
    size_t       cell_size;
    int64_t      d;

    const char * cell(int64_t i) const { return data + i*cell_size; }

    void prefetch(int64_t i) const {
        for (size_t c = 0; c < d*sizeof(ggml_fp16_t); c += 64) {
            __builtin_prefetch(cell(i) + c);
        }
    }
};

template <int R, int N>
void add_values(const block & b, const stored & v, int64_t c, const float (&weights)[R][BLOCK], const float (&decay)[R], const state_list & states) {
    vector acc[R][N];

    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < N; ++i) {
            acc[r][i] = load(states[r].values() + c + i*LANES)*decay[r];
        }
    }
    for (int64_t j = 0; j < b.n; ++j) {
        const char * value = v.cell(b.cells[j]) + c*sizeof(ggml_fp16_t);

        for (int i = 0; i < N; ++i) {
            const vector x = load_half(value + i*LANES*sizeof(ggml_fp16_t));

            for (int r = 0; r < R; ++r) {
                acc[r][i] += weights[r][j]*x;
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < N; ++i) {
            store(states[r].values() + c + i*LANES, acc[r][i]);
        }
    }
}

// R query heads, queries: q, q + q_stride, ..., meet the cells of a block
template <int R>
void attend(const block & b, const stored & k, const stored & v, const float * q, int64_t q_stride, float scale, const state_list & states) {
    float weights[R][BLOCK];
    float decay[R];

    const int64_t n = GGML_PAD(b.n, LANES);

    for (int64_t j0 = 0; j0 < n; j0 += LANES) {
        vector products[R][LANES];

        for (int64_t j = 0; j < LANES; ++j) {
            const char * key = k.cell(b.cells[j0 + j]);

            // what the next block most likely is: memory is slow and the hardware does not see the pattern
            k.prefetch(b.cells[j0 + j] + BLOCK);
            v.prefetch(b.cells[j0 + j] + BLOCK);

            vector acc[R] = {};
            for (int64_t c = 0; c < k.d; c += LANES) {
                const vector x = load_half(key + c*sizeof(ggml_fp16_t));

                for (int r = 0; r < R; ++r) {
                    acc[r] += load(q + r*q_stride + c)*x;
                }
            }
            for (int r = 0; r < R; ++r) {
                products[r][j] = acc[r];
            }
        }
        for (int r = 0; r < R; ++r) {
            store(weights[r] + j0, sums_of(products[r])*scale + load(b.bias + j0));
        }
    }

    for (int r = 0; r < R; ++r) {
        const state s = states[r];

        vector top = vector{} + s.max();
        for (int64_t j = 0; j < n; j += LANES) {
            top = larger(top, load(weights[r] + j));
        }

        const float max = largest_of(top);

        decay[r] = expf(s.max() - max);
        s.max()  = max;

        vector sum = load(s.sums())*decay[r];
        for (int64_t j = 0; j < n; j += LANES) {
            const vector w = exp_of(load(weights[r] + j) - max);
            store(weights[r] + j, w);
            sum += w;
        }
        store(s.sums(), sum);
    }

    int64_t c = 0;
    for (; c + COLUMNS*LANES <= v.d; c += COLUMNS*LANES) {
        add_values<R, COLUMNS>(b, v, c, weights, decay, states);
    }
    for (; c < v.d; c += LANES) {
        add_values<R, 1>(b, v, c, weights, decay, states);
    }
}

void merge(const state_list & parts, int n, int64_t d, float * out) {
    float max = -INFINITY;
    for (int p = 0; p < n; ++p) {
        max = std::max(max, parts[p].max());
    }

    std::fill(out, out + d, 0.0f);
    if (max == -INFINITY) {
        return;
    }

    float sum = 0.0f;
    for (int p = 0; p < n; ++p) {
        const state s = parts[p];

        const float weight = expf(s.max() - max);

        sum += weight*sum_of(load(s.sums()));
        for (int64_t c = 0; c < d; c += LANES) {
            store(out + c, load(out + c) + weight*load(s.values() + c));
        }
    }

    for (int64_t c = 0; c < d; c += LANES) {
        store(out + c, load(out + c)/sum);
    }
}

} // namespace

void kvl_cpu_attention::compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & op = *(kvl_cpu_attention *) userdata;

    const ggml_tensor * q = dst->src[0]; // F32 [d, n_tokens per stream, n_head,    n_stream]
    const ggml_tensor * k = dst->src[1]; // F16 [d, n_kv,                n_head_kv, n_stream]
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * m = dst->src[3]; // F16 [n_kv, n_tokens per stream, 1, n_stream]

    const int64_t d       = v->ne[0];
    const int64_t n_head  = q->ne[2];
    const int64_t n_group = n_head/k->ne[2];
    const int64_t n_rows  = n_head*q->ne[1]*q->ne[3];
    const int     n_used  = std::min(nth, op.n_parts);

    if (ith >= n_used) {
        return;
    }

    float * out = (float *) dst->data;

    const state_list states = { out + n_rows*d, state::HEADER + d };

    for (int64_t t = 0; t < n_rows/n_head; ++t) {
        const int64_t i = t%q->ne[1];
        const int64_t s = t/q->ne[1];

        const state_list heads = states + (ith*n_rows + t*n_head);
        for (int64_t h = 0; h < n_head; ++h) {
            heads[h].clear(d);
        }

        const reader cells = { (const uint16_t *) ((const char *) m->data + i*m->nb[1] + s*m->nb[3]), k->ne[1] };

        const int64_t n_visible = cells.count(0, cells.n_kv);

        int64_t n = n_visible*(ith + 1)/n_used - n_visible*ith/n_used;
        if (n == 0) {
            continue;
        }

        block b;
        for (int64_t begin = cells.find(n_visible*ith/n_used); n > 0; n -= b.n) {
            begin = cells.fill(b, begin, std::min(n, BLOCK));

            for (int64_t h = 0; h < k->ne[2]; ++h) {
                const stored keys   = { (const char *) k->data + h*k->nb[2] + s*k->nb[3], k->nb[1], k->ne[0] };
                const stored values = { (const char *) v->data + h*v->nb[2] + s*v->nb[3], v->nb[1], v->ne[0] };

                for (int64_t h0 = h*n_group; h0 < (h + 1)*n_group; h0 += ROWS) {
                    const float * query = (const float *) ((const char *) q->data + i*q->nb[1] + h0*q->nb[2] + s*q->nb[3]);

                    constexpr decltype(&attend<1>) variants[] = { attend<1>, attend<2>, attend<3>, attend<4> };

                    const int64_t n_at_once = std::min<int64_t>(ROWS, (h + 1)*n_group - h0);

                    variants[n_at_once - 1](b, keys, values, query, q->nb[2]/sizeof(float), op.scale, heads + h0);
                }
            }
        }
    }

    // the last thread to get here merges
    if (op.n_done.fetch_add(1) + 1 < n_used) {
        return;
    }
    op.n_done = 0;

    for (int64_t r = 0; r < n_rows; ++r) {
        merge({ states[r].data, n_rows*states.stride }, n_used, d, out + r*d);
    }
}
