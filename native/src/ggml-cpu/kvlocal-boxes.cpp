// Boxes: the least and the largest number that the keys of a block have in each channel. They bound the product of a query with any of these keys
// (Quest, ArkVale), so that few blocks need to be looked at closely.

#include "kvlocal-panels.h"

#include <numeric>

namespace {

// what the boxes of one head let the queries of its group expect
struct box_search {
    const kvl_cpu_best_rows & task;

    const int64_t d;
    const int64_t n_group;
    const int64_t n_bound;
    const int64_t n_rows;  // queries of the group, padded
    const int64_t begin;   // blocks
    const int64_t end;
    const int64_t n_wide;  // of them, padded

    std::vector<float>   up;     // [d, n_rows] the positive parts of the queries
    std::vector<float>   down;   // [d, n_rows] the negative parts
    std::vector<float>   bounds; // [n_rows, n_wide]
    std::vector<float>   best;   // [n_wide] of each block
    std::vector<int32_t> order;  // [end - begin]

    explicit box_search(const kvl_cpu_best_rows & task) :
        task(task),
        d(task.scores.n_embd_head),
        n_group(task.scores.n_head/task.scores.n_head_kv),
        n_bound(task.n_bound),
        n_rows(GGML_PAD(n_bound*n_group, ROWS)),
        begin(task.first/KVL_BLOCK),
        end(task.last/KVL_BLOCK),
        n_wide(GGML_PAD(end - begin, LANES) + LANES),
        up(d*n_rows), down(d*n_rows), bounds(n_rows*n_wide), best(n_wide), order(end - begin) {}

    // chosen: [n_block] blocks, ascending
    void run(int64_t layer, int64_t head, int32_t * chosen) {
        const auto & stretches = task.scores.stretches;

        for (size_t s = 0; s < stretches.size(); ++s) {
            // a block belongs to the stretch of its first row
            const int64_t from = (stretches[s].start + KVL_BLOCK - 1)/KVL_BLOCK;
            const int64_t to   = s + 1 < stretches.size() ? (stretches[s + 1].start + KVL_BLOCK - 1)/KVL_BLOCK : end;

            if (std::max(from, begin) < std::min(to, end)) {
                set_rows(layer, head, stretches[s].copy);
                bound(layer, head, std::max(from, begin), std::min(to, end));
            }
        }

        std::fill(best.begin(), best.end(), 0.0f);
        for (int64_t q = 0; q < n_bound; ++q) {
            add(q*n_group);
        }

        std::iota(order.begin(), order.end(), (int32_t) begin);
        std::nth_element(order.begin(), order.begin() + task.n_block, order.end(), [&](int32_t a, int32_t b) {
            return best[a - begin] > best[b - begin];
        });
        std::copy_n(order.begin(), task.n_block, chosen);
        std::sort(chosen, chosen + task.n_block);
    }

private:
    void set_rows(int64_t layer, int64_t head, int64_t copy) {
        const auto & scores = task.scores;

        const int64_t n_query = scores.rows.size();

        for (int64_t r = 0; r < n_bound*n_group; ++r) {
            // spread over the queries, the last one among them
            const int64_t query = n_query - 1 - r/n_group*n_query/n_bound;

            const float * q = scores.queries[layer] + ((copy*n_query + query)*scores.n_head + head*n_group + r%n_group)*d;

            for (int64_t c = 0; c < d; ++c) {
                const float x = q[c]*scores.scales[layer];

                up  [c*n_rows + r] = std::max(x, 0.0f);
                down[c*n_rows + r] = std::min(x, 0.0f);
            }
        }
    }

    // of the blocks from first to last - 1
    void bound(int64_t layer, int64_t head, int64_t first, int64_t last) {
        vector acc[ROWS];

        for (int64_t at = first/LANES*LANES; at < last; at += LANES) {
            const ggml_fp16_t * least   = task.boxes[at/task.n_box] + (layer*task.scores.n_head_kv + head)*2*d*task.n_box + at%task.n_box;
            const ggml_fp16_t * largest = least + d*task.n_box;

            for (int64_t r0 = 0; r0 < n_bound*n_group; r0 += ROWS) {
                for (int64_t r = 0; r < ROWS; ++r) {
                    acc[r] = vector{};
                }
                for (int64_t c = 0; c < d; ++c) {
                    const vector lo = load_half(least   + c*task.n_box);
                    const vector hi = load_half(largest + c*task.n_box);

                    for (int64_t r = 0; r < ROWS; ++r) {
                        acc[r] += up[c*n_rows + r0 + r]*hi;
                        acc[r] += down[c*n_rows + r0 + r]*lo;
                    }
                }
                for (int64_t r = 0; r < ROWS; ++r) {
                    for (int64_t t = std::max(first - at, (int64_t) 0); t < std::min(last - at, LANES); ++t) {
                        bounds[(r0 + r)*n_wide + at + t - begin] = acc[r][t];
                    }
                }
            }
        }
    }

    // the softmax over the blocks of the group's rows from r0 on, their maximum to best
    void add(int64_t r0) {
        const int64_t n = end - begin;

        for (int64_t g = 0; g < n_group; ++g) {
            float * x = bounds.data() + (r0 + g)*n_wide;

            std::fill(x + n, x + n_wide, -INFINITY);
        }

        softmax_largest(bounds.data() + r0*n_wide, n_group, n_wide, GGML_PAD(n, LANES), nullptr);

        const float * x = bounds.data() + (r0 + n_group - 1)*n_wide;
        for (int64_t j = 0; j < n; j += LANES) {
            store(best.data() + j, load(best.data() + j) + load(x + j));
        }
    }
};

} // namespace

void kvl_fill_boxes(ggml_type type, int64_t n_embd_head, int64_t n_head, const uint8_t * keys, int64_t chunk_size, int64_t first_block, int64_t n_block, ggml_fp16_t * boxes) {
    const size_t  size  = ggml_row_size(type, n_embd_head);
    const int64_t n_box = chunk_size/KVL_BLOCK;

    std::vector<float> key(n_embd_head);
    std::vector<float> least(n_embd_head);
    std::vector<float> largest(n_embd_head);

    for (int64_t h = 0; h < n_head; ++h) {
        for (int64_t b = first_block; b < first_block + n_block; ++b) {
            for (int64_t i = 0; i < KVL_BLOCK; ++i) {
                const uint8_t * stored = keys + (h*chunk_size + b*KVL_BLOCK + i)*size;

                to_floats(type, stored, key.data(), n_embd_head);

                for (int64_t c = 0; c < n_embd_head; ++c) {
                    least  [c] = i > 0 ? std::min(least  [c], key[c]) : key[c];
                    largest[c] = i > 0 ? std::max(largest[c], key[c]) : key[c];
                }
            }

            ggml_fp16_t * out = boxes + h*2*n_embd_head*n_box + b;

            for (int64_t c = 0; c < n_embd_head; ++c) {
                out[c*n_box]                 = ggml_fp32_to_fp16(least  [c]);
                out[(n_embd_head + c)*n_box] = ggml_fp32_to_fp16(largest[c]);
            }
        }
    }
}

void kvl_cpu_best_rows::compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & task = *(const kvl_cpu_best_rows *) userdata;

    const int64_t n_best = dst->ne[0];

    box_search search(task);
    attention  att(task.scores, n_best);

    std::vector<int32_t> blocks(task.n_block);
    std::vector<float>   out(att.n_column);

    for (int64_t u = ith; u < ggml_nrows(dst); u += nth) {
        const int64_t layer = u/task.scores.n_head_kv;
        const int64_t head  = u%task.scores.n_head_kv;

        int32_t * best = task.best + u*n_best;
        int32_t * next = best;

        if (task.n_block > 0) {
            search.run(layer, head, blocks.data());
        }

        std::iota(next, next + task.first, 0);
        next += task.first;

        for (const int32_t b : blocks) {
            std::iota(next, next + KVL_BLOCK, (int32_t) (b*KVL_BLOCK));
            next += KVL_BLOCK;
        }

        std::iota(next, best + n_best, (int32_t) task.last);

        att.order = best;
        att.stretches.clear();

        for (const auto & stretch : task.scores.stretches) {
            const auto at = std::lower_bound(best, best + n_best, stretch.start) - best;

            // of stretches without a chosen row none is left
            if (!att.stretches.empty() && att.stretches.back().start == at) {
                att.stretches.pop_back();
            }
            if (at < n_best) {
                att.stretches.push_back({ (int32_t) at, stretch.copy });
            }
        }

        att.run(layer, head, out.data());

        memcpy((float *) dst->data + u*n_best, out.data(), n_best*sizeof(float));
    }
}
