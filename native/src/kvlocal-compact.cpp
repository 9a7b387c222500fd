// Compaction: per layer and head, bring the kept rows, of the cache or of the host, to the front of the stream and free the rest.

#include "kvlocal-impl.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace {

// what becomes of the keys or values of one layer
struct row_move {
    ggml_tensor   * stream;
    int64_t         n_embd; // numbers of the row of one head
    size_t          size;   // its bytes
    const int32_t * gather; // [n_head_kv, n_keep]

    uint8_t * const * chunks; // of the host, see kvl_rows
    int64_t           chunk_size;
    ggml_type         host_type;
    size_t            host_size; // bytes of the row of one head
    size_t            offset;    // of the layer in a chunk

    size_t cell_size() const { return stream->nb[1]; }

    const uint8_t * host(int64_t head, int64_t row) const {
        return chunks[row/chunk_size] + offset + (head*chunk_size + row%chunk_size)*host_size;
    }

    // from rows of the host to those of the stream
    kvl_row_conversion conversion() const { return { host_type, stream->type, n_embd }; }
};

// the rows of one head in place, data: [n_cells] rows that are cell_size apart
// cells are named in ascending order: those that move forwards never meet those that move backwards, and within each kind
// the order of moving sees to it that no row is overwritten before it was read; rows of the host come last
void move_head(const row_move & move, char * data, int64_t head, int32_t n_keep, int32_t n_cells) {
    const size_t step = move.cell_size();

    const int32_t * from = move.gather + head*n_keep;

    data += head*move.size;

    auto convert = move.conversion();

    for (int64_t j = 0; j < n_keep; ++j) {
        if (from[j] > j && from[j] < n_cells) {
            memcpy(data + j*step, data + from[j]*step, move.size);
        }
    }
    for (int64_t j = n_keep - 1; j >= 0; --j) {
        if (from[j] < j) {
            memcpy(data + j*step, data + from[j]*step, move.size);
        }
    }
    for (int64_t j = 0; j < n_keep; ++j) {
        if (from[j] >= n_cells) {
            convert(move.host(head, from[j] - n_cells), data + j*step);
        }
    }
}

struct move_task {
    std::vector<row_move> moves;

    int64_t n_head_kv;
    int32_t n_keep;
    int32_t n_cells;

    static void compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
        GGML_UNUSED(dst);

        const auto & task = *(const move_task *) userdata;

        const int64_t n_units = task.moves.size()*task.n_head_kv;

        for (int64_t u = ith; u < n_units; u += nth) {
            const auto & move = task.moves[u/task.n_head_kv];

            move_head(move, (char *) move.stream->data, u%task.n_head_kv, task.n_keep, task.n_cells);
        }
    }
};

// what the graph is given of the layers whose cells are in one kind of memory, in one block of it: one transfer takes less than one for each tensor
struct input_block {
    struct input {
        ggml_tensor        * tensor;
        std::vector<uint8_t> data;
    };

    std::vector<input> inputs;

    template <typename T>
    ggml_tensor * add(ggml_context * ctx, ggml_type type, const std::vector<T> & values) {
        const auto * begin = (const uint8_t *) values.data();

        inputs.push_back({
            ggml_new_tensor_1d(ctx, type, values.size()*sizeof(T)/ggml_type_size(type)),
            { begin, begin + values.size()*sizeof(T) },
        });

        return inputs.back().tensor;
    }

    void upload(const kvl_cache & cache, ggml_context * ctx, ggml_backend_buffer_type_t buft) {
        const size_t alignment = ggml_backend_buft_get_alignment(buft);

        size_t size = 0;
        for (const auto & in : inputs) {
            size += GGML_PAD(ggml_backend_buft_get_alloc_size(buft, in.tensor), alignment);
        }

        ggml_backend_buffer_t buffer = kvl_input_buffer(*cache.lctx, buft, size + alignment);

        auto place = ggml_tallocr_new(buffer);

        for (const auto & in : inputs) {
            if (ggml_tallocr_alloc(&place, in.tensor) != GGML_STATUS_SUCCESS) {
                throw kvl_error(KVL_ERR_MEMORY, "a device has no memory for what cells are moved by");
            }
        }

        auto * begin = (uint8_t *) inputs[0].tensor->data;

        std::vector<uint8_t> all((uint8_t *) inputs.back().tensor->data + inputs.back().data.size() - begin);

        for (const auto & in : inputs) {
            memcpy(all.data() + ((uint8_t *) in.tensor->data - begin), in.data.data(), in.data.size());
        }

        ggml_tensor * block = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, all.size());

        if (ggml_backend_tensor_alloc(buffer, block, begin) != GGML_STATUS_SUCCESS) {
            throw kvl_error(KVL_ERR_MEMORY, "a device has no memory for what cells are moved by");
        }

        ggml_backend_tensor_set(block, all.data(), 0, all.size());
    }
};

// a stream that is moved in host memory, though it is elsewhere
struct staged_move {
    const row_move * move;

    std::vector<uint8_t> before;
    std::vector<uint8_t> after;
};

// a stream as n_rows rows of n_embd values of this type; t: the stream, or what was computed in its place
ggml_tensor * view_rows(ggml_context * ctx, ggml_tensor * t, ggml_type type, int64_t n_embd, int64_t n_rows) {
    GGML_ASSERT(ggml_nbytes(t) == ggml_row_size(type, n_embd)*n_rows);

    ggml_tensor * res = ggml_view_2d(ctx, t, t->ne[0], t->ne[1], t->nb[1], 0);

    res->type  = type;
    res->ne[0] = n_embd;
    res->ne[1] = n_rows;
    res->nb[0] = ggml_type_size(type);
    res->nb[1] = ggml_row_size(type, n_embd);
    res->nb[2] = res->nb[3] = res->nb[1]*n_rows;

    return res;
}

// builds the graph of one compaction; everything that can fail for want of memory or support does so before the graph runs
struct compaction {
    static constexpr size_t MAX_GROUPS = 6;

    const kvl_cache     & cache;
    const kvl_compaction & what;

    const int32_t  n_cells;
    const uint32_t stream;

    kvl_graph graph;
    move_task task;

    std::map<ggml_backend_buffer_type_t, input_block> blocks;
    std::vector<staged_move> staged;

    size_t n_rotated = 0;

    compaction(const kvl_cache & cache, int32_t seq_id, const kvl_compaction & what) :
        cache(cache),
        what(what),
        n_cells(kvl_access::cells(*cache.kv, seq_id).used_max_p1()),
        stream(cache.kv->get_stream(seq_id)),
        graph(cache, (16 + (what.delta ? 24*MAX_GROUPS : 0))*cache.n_layer + 64),
        task({ {}, cache.n_head_kv, what.n_keep, n_cells }) {}

    size_t n_idx() const { return (size_t) cache.n_head_kv*what.n_keep; }

    // of one layer: flat indices, cell*n_head_kv + head
    int64_t flat(int64_t cell, int64_t head) const { return cell*cache.n_head_kv + head; }

    int64_t n_flat() const { return flat(cache.kv->get_size(), 0); }

    // of the layer that is moved
    input_block * block = nullptr;

    template <typename T>
    ggml_tensor * input(ggml_type type, const std::vector<T> & values) {
        return block->add(graph.ctx(), type, values);
    }

    void run() {
        plan();

        const bool in_place = !what.portable && kvl_is_on_cpu(cache) && is_ascending();

        if ((int64_t) cache.kv->get_size()*cache.n_head_kv > INT32_MAX) {
            throw kvl_error(KVL_ERR_UNSUPPORTED, "a cache of " + std::to_string(cache.kv->get_size()) + " cells is too large to be compacted");
        }

        if (in_place) {
            graph.cpu_op(1, 1, 1, move_task::compute, &task);
        }

        ggml_tensor * hadamard = what.delta ? kvl_build_k_rot(cache, graph.ctx()) : nullptr;

        const size_t n_move = task.moves.size()/cache.n_layer; // of a layer, the keys first

        for (int32_t i = 0; i < cache.n_layer; ++i) {
            const auto & layer = kvl_access::layers(*cache.kv)[i];

            ggml_tensor * k = layer.k_stream[stream];

            block = &blocks[ggml_backend_buffer_get_type(layer.k->buffer)];

            if (!in_place) {
                auto where = find_rows(task.moves[n_move*i]);

                k = build_move(task.moves[n_move*i], where);
                if (n_move > 1) {
                    build_move(task.moves[n_move*i + 1], where);
                }
            }
            if (what.delta && kvl_access::hparams(*cache.kv).has_rope(layer.il)) {
                build_rotation(i, k, layer.k->type, layer.il, hadamard);
            }
        }

        for (auto & [buft, inputs] : blocks) {
            if (!inputs.inputs.empty()) {
                inputs.upload(cache, graph.ctx(), buft);
            }
        }

        graph.run([&]() {
            if (hadamard && hadamard->buffer) {
                cache.kv->set_input_k_rot(hadamard);
            }
            for (auto & s : staged) {
                move_staged(s);
            }
        });
    }

private:
    void plan() {
        const auto & layers = kvl_access::layers(*cache.kv);

        const auto * rows = what.rows;

        for (int32_t i = 0; i < cache.n_layer; ++i) {
            ggml_tensor * k = layers[i].k_stream[stream];
            ggml_tensor * v = layers[i].v ? layers[i].v_stream[stream] : nullptr;

            add_move(i, k, cache.n_embd_head_k, kvl_row_size_k(cache), rows ? rows->k : nullptr, rows ? (ggml_type) rows->type_k : k->type);
            if (v) {
                add_move(i, v, cache.n_embd_row_v, kvl_row_size_v(cache), rows ? rows->v : nullptr, rows ? (ggml_type) rows->type_v : v->type);
            }
        }
    }

    void add_move(int32_t i_layer, ggml_tensor * t, int64_t n_embd, size_t size, uint8_t * const * chunks, ggml_type type) {
        const int64_t chunk_size = what.rows ? what.rows->chunk_size : 1;
        const size_t  host_size  = ggml_row_size(type, n_embd);

        task.moves.push_back({
            t, n_embd, size, what.gather + i_layer*n_idx(), chunks, chunk_size, type, host_size, i_layer*cache.n_head_kv*chunk_size*host_size,
        });
    }

    // the cells of every head, those of the host left out
    bool is_ascending() const {
        for (size_t i = 0; i < cache.n_layer*n_idx(); i += what.n_keep) {
            int32_t last = -1;

            for (int32_t j = 0; j < what.n_keep; ++j) {
                const int32_t from = what.gather[i + j];

                if (from < n_cells) {
                    if (from <= last) {
                        return false;
                    }
                    last = from;
                }
            }
        }

        return true;
    }

    // which rows of a layer move, the same for its keys and its values: flat indices, as tensors once one of the two needs them
    struct moved_rows {
        std::vector<int32_t> from;
        std::vector<int64_t> to;
        std::vector<int64_t> host_to;

        ggml_tensor * t_from    = nullptr;
        ggml_tensor * t_to      = nullptr;
        ggml_tensor * t_host_to = nullptr;
    };

    // move: of the keys or the values of a layer
    moved_rows find_rows(const row_move & move) {
        moved_rows res;

        for (int64_t h = 0; h < cache.n_head_kv; ++h) {
            for (int64_t j = 0; j < what.n_keep; ++j) {
                const int64_t cell = move.gather[h*what.n_keep + j];

                if (cell >= n_cells) {
                    res.host_to.push_back(flat(j, h));
                } else if (cell != j) {
                    res.from.push_back((int32_t) flat(cell, h));
                    res.to.push_back(flat(j, h));
                }
            }
        }

        return res;
    }

    // rows as numbers of 32 bits, whatever they mean: every backend copies those as they are
    // returns the stream after the move
    ggml_tensor * build_move(const row_move & move, moved_rows & where) {
        if (move.size % sizeof(float) != 0) {
            staged.push_back({
                &move,
                std::vector<uint8_t>(n_cells*move.cell_size()),
                std::vector<uint8_t>(what.n_keep*move.cell_size()),
            });
            return move.stream;
        }

        auto * ctx = graph.ctx();

        const int64_t n_word = move.size/sizeof(float);

        ggml_tensor * words = view_rows(ctx, move.stream, GGML_TYPE_F32, n_word, n_flat());

        if (!where.from.empty()) {
            if (!where.t_from) {
                where.t_from = input(GGML_TYPE_I32, where.from);
                where.t_to   = input(GGML_TYPE_I64, where.to);
            }

            ggml_tensor * kept = ggml_get_rows(ctx, words, where.t_from);
            words = ggml_set_rows(ctx, words, kept, where.t_to);
            graph.expand(words);
        }
        if (!where.host_to.empty()) {
            if (!where.t_host_to) {
                where.t_host_to = input(GGML_TYPE_I64, where.host_to);
            }

            ggml_tensor * brought = ggml_reshape_2d(ctx, input(GGML_TYPE_F32, host_rows(move)), n_word, where.host_to.size());
            words = ggml_set_rows(ctx, words, brought, where.t_host_to);
            graph.expand(words);
        }

        return words;
    }

    // the rows that the host brings along, as the stream has them, in the order of moved_rows::host_to
    std::vector<uint8_t> host_rows(const row_move & move) {
        std::vector<uint8_t> res;

        auto convert = move.conversion();

        for (int64_t h = 0; h < cache.n_head_kv; ++h) {
            for (int64_t j = 0; j < what.n_keep; ++j) {
                const int64_t cell = move.gather[h*what.n_keep + j];

                if (cell >= n_cells) {
                    res.resize(res.size() + move.size);
                    convert(move.host(h, cell - n_cells), res.data() + res.size() - move.size);
                }
            }
        }

        return res;
    }

    // k: the stream after the move
    void build_rotation(int32_t i_layer, ggml_tensor * k, ggml_type type, uint32_t il, ggml_tensor * hadamard) {
        // keys by what they are rotated by: where that is the same for many they share its sines
        std::map<int32_t, std::vector<int64_t>> rows;

        const int32_t * delta = what.delta + i_layer*n_idx();

        for (int64_t h = 0; h < cache.n_head_kv; ++h) {
            for (int64_t j = 0; j < what.n_keep; ++j) {
                if (delta[h*what.n_keep + j] != 0) {
                    rows[delta[h*what.n_keep + j]].push_back(flat(j, h));
                }
            }
        }

        if (rows.size() <= MAX_GROUPS) {
            for (const auto & [by, group] : rows) {
                build_rotation(k, type, il, hadamard, group, { by });
            }
            return;
        }

        std::vector<int64_t> all;
        std::vector<int32_t> by;

        for (const auto & [d, group] : rows) {
            all.insert(all.end(), group.begin(), group.end());
            by .insert(by .end(), group.size(), d);
        }

        build_rotation(k, type, il, hadamard, all, by);
    }

    // by: one number for each row, or one for all
    void build_rotation(ggml_tensor * k, ggml_type type, uint32_t il, ggml_tensor * hadamard, const std::vector<int64_t> & rows, const std::vector<int32_t> & by) {
        if (rows.empty()) {
            return;
        }

        n_rotated += rows.size();

        auto * ctx = graph.ctx();

        const std::vector<int32_t> from(rows.begin(), rows.end());

        ggml_tensor * keys    = view_rows(ctx, k, type, cache.n_embd_head_k, n_flat());
        ggml_tensor * rotated = ggml_get_rows(ctx, keys, input(GGML_TYPE_I32, from)); // F32 [n_embd_head_k, n]

        rotated = kvl_build_rotate(cache, ctx, rotated, input(GGML_TYPE_I32, by), hadamard, il);

        graph.expand(ggml_set_rows(ctx, keys, rotated, input(GGML_TYPE_I64, rows)));
    }

    // where rows are no whole numbers of 32 bits: to the host and back
    void move_staged(staged_move & s) const {
        const auto & move = *s.move;

        const size_t step = move.cell_size();

        ggml_backend_tensor_get(move.stream, s.before.data(), 0, s.before.size());

        auto convert = move.conversion();

        for (int64_t h = 0; h < cache.n_head_kv; ++h) {
            for (int64_t j = 0; j < what.n_keep; ++j) {
                const int64_t from = move.gather[h*what.n_keep + j];

                uint8_t * to = s.after.data() + j*step + h*move.size;

                if (from < n_cells) {
                    memcpy(to, s.before.data() + from*step + h*move.size, move.size);
                } else {
                    convert(move.host(h, from - n_cells), to);
                }
            }
        }

        ggml_backend_tensor_set(move.stream, s.after.data(), 0, s.after.size());
    }
};

} // namespace

// whether one of the last n kept cells is moved to another position in any head
static bool rotates_last(const kvl_cache & cache, const kvl_compaction & what, int32_t n) {
    const size_t n_row = (size_t) cache.n_layer*cache.n_head_kv;

    for (size_t i = 1; i <= n_row; ++i) {
        const int32_t * end = what.delta + i*what.n_keep;

        if (std::any_of(end - std::min(n, what.n_keep), end, [](int32_t d) { return d != 0; })) {
            return true;
        }
    }

    return false;
}

void kvl_compact_cells(const kvl_cache & cache, int32_t seq_id, const kvl_compaction & what) {
    compaction task(cache, seq_id, what);

    task.run();

    auto & cells = kvl_access::cells(*cache.kv, seq_id);

    const int32_t n_cells = cells.used_max_p1();

    for (int32_t i = 0; i < n_cells; ++i) {
        if (!cells.is_empty(i)) {
            cells.rm(i);
        }
    }

    for (int32_t j = 0; j < what.n_keep; ++j) {
        cells.pos_set(j, what.pos[j]);
        cells.seq_add(j, seq_id);
    }

    kvl_access::head(*cache.kv, seq_id) = what.n_keep;

    if (what.delta) {
        auto * ring = kvl_access::ring(*cache.kv).get();

        if (ring && rotates_last(cache, what, ring->n_window)) {
            kvl_ring_invalidate(ring, seq_id);
        }

        // a rotation of all is rare and its buffers are the largest: they are not kept
        if (2*task.n_rotated > cache.n_layer*task.n_idx()) {
            kvl_access::runtime(*cache.lctx).reset();
        }
    }
}
