// Rows of cells in host memory: keys and values as they are stored, or in another type.

#include "kvlocal-impl.h"

#include <algorithm>
#include <cstring>
#include <map>

size_t kvl_row_size_k(const kvl_cache & cache) {
    return ggml_row_size(kvl_access::layers(*cache.kv)[0].k->type, cache.n_embd_head_k);
}

size_t kvl_row_size_v(const kvl_cache & cache) {
    return ggml_row_size(kvl_type_v(kvl_access::layers(*cache.kv)[0]), cache.n_embd_row_v);
}

size_t kvl_row_size(int32_t type, int64_t n) {
    if (!kvl_is_cache_type(type)) {
        throw kvl_error(KVL_ERR_ARGUMENT, "rows can't be of type " + std::to_string(type));
    }

    const int64_t n_block = ggml_blck_size((ggml_type) type);

    if (n % n_block != 0) {
        throw kvl_error(KVL_ERR_ARGUMENT, "a head of " + std::to_string(n) + " numbers is no whole blocks of " + std::to_string(n_block));
    }

    return ggml_row_size((ggml_type) type, n);
}

kvl_row_conversion::kvl_row_conversion(ggml_type from, ggml_type to, int64_t n) : from(from), to(to), size(ggml_row_size(to, n)), numbers(n) {}

void kvl_row_conversion::operator()(const void * src, void * dst) {
    const int64_t n = numbers.size();

    if (from == to) {
        memcpy(dst, src, size);
        return;
    }

    if (from == GGML_TYPE_F32) {
        memcpy(numbers.data(), src, n*sizeof(float));
    } else {
        ggml_get_type_traits(from)->to_float(src, numbers.data(), n);
    }

    if (to == GGML_TYPE_F32) {
        memcpy(dst, numbers.data(), n*sizeof(float));
    } else {
        ggml_get_type_traits(to)->from_float_ref(numbers.data(), dst, n);
    }
}

static bool is_null(const uint8_t * p) {
    return !p;
}

void kvl_check_rows(const kvl_cache & cache, const kvl_rows & rows) {
    if (rows.n_chunk < 1 || rows.chunk_size < 1 || rows.n_rows < 1 || rows.n_rows > (int64_t) rows.n_chunk*rows.chunk_size) {
        throw kvl_error(KVL_ERR_ARGUMENT, std::to_string(rows.n_rows) + " rows are not in " + std::to_string(rows.n_chunk) + " chunks of " +
                std::to_string(rows.chunk_size));
    }
    if (!rows.k || !rows.v || std::any_of(rows.k, rows.k + rows.n_chunk, is_null) || std::any_of(rows.v, rows.v + rows.n_chunk, is_null)) {
        throw kvl_error(KVL_ERR_ARGUMENT, "the rows are null");
    }

    const int64_t n = (int64_t) cache.n_layer*cache.n_head_kv*rows.chunk_size;

    const int64_t n_bytes_k = n*(int64_t) kvl_row_size(rows.type_k, cache.n_embd_head_k);
    const int64_t n_bytes_v = n*(int64_t) kvl_row_size(rows.type_v, cache.n_embd_row_v);

    if (rows.n_bytes_k != n_bytes_k || rows.n_bytes_v != n_bytes_v) {
        throw kvl_error(KVL_ERR_ARGUMENT, "the rows have " + std::to_string(rows.n_bytes_k) + " and " + std::to_string(rows.n_bytes_v) +
                " bytes, " + std::to_string(n_bytes_k) + " and " + std::to_string(n_bytes_v) + " are needed");
    }
}

namespace {

// keys or values of one layer, and where they go
struct stream_read {
    ggml_tensor * stream;
    int64_t       n_embd; // numbers of the row of one head
    ggml_type     type;   // of a row there
    uint8_t     * out;    // [n_head_kv, n]

    size_t size() const { return ggml_row_size(stream->type, n_embd); }
};

// rows: of head h and number i as at(h, i) has them
template <typename F>
void convert_rows(const stream_read & read, int64_t n_head_kv, int64_t n, F && at) {
    kvl_row_conversion convert(read.stream->type, read.type, read.n_embd);

    const size_t size_out = ggml_row_size(read.type, read.n_embd);

    uint8_t * out = read.out;

    for (int64_t h = 0; h < n_head_kv; ++h) {
        for (int64_t i = 0; i < n; ++i, out += size_out) {
            convert(at(h, i), out);
        }
    }
}

// the cells from the first to the last that is asked for, if they are not in reach: one transfer takes less than one for each of them
void read_stream(const stream_read & read, int64_t n_head_kv, const int32_t * cells, int64_t n) {
    const auto [first, last] = std::minmax_element(cells, cells + n);

    const size_t step  = read.stream->nb[1];
    const size_t begin = *first*step;
    const size_t size  = read.size();

    std::vector<uint8_t> staged;

    const uint8_t * data;

    if (kvl_is_on_cpu(read.stream)) {
        data = (const uint8_t *) read.stream->data + begin;
    } else {
        staged.resize((*last - *first + 1)*step);
        ggml_backend_tensor_get(read.stream, staged.data(), begin, staged.size());
        data = staged.data();
    }

    convert_rows(read, n_head_kv, n, [&](int64_t h, int64_t i) { return data + (cells[i] - *first)*step + h*size; });
}

// the rows of several streams of one kind of memory, put together there: one transfer takes less than one for each stream
void read_streams(const kvl_cache & cache, const std::vector<stream_read> & reads, const int32_t * cells, int64_t n) {
    const int64_t n_flat = (int64_t) cache.kv->get_size()*cache.n_head_kv;

    std::vector<int32_t> rows;
    rows.reserve(cache.n_head_kv*n);

    for (int64_t h = 0; h < cache.n_head_kv; ++h) {
        for (int64_t i = 0; i < n; ++i) {
            rows.push_back((int32_t) (cells[i]*cache.n_head_kv + h));
        }
    }

    kvl_graph graph(cache, 6*reads.size() + 16);

    auto * ctx = graph.ctx();

    ggml_tensor * index = graph.input(GGML_TYPE_I32, rows.size());

    std::vector<ggml_tensor *> parts;

    for (const auto & read : reads) {
        // as numbers of 32 bits, whatever they mean: every backend copies those as they are
        ggml_tensor * words = kvl_view_rows(ctx, read.stream, GGML_TYPE_F32, read.size()/sizeof(float), n_flat);
        ggml_tensor * found = ggml_get_rows(ctx, words, index);

        parts.push_back(ggml_reshape_1d(ctx, found, ggml_nelements(found)));
    }

    // neighbours first, so that nothing is copied more often than there are levels
    while (parts.size() > 1) {
        std::vector<ggml_tensor *> pairs;

        for (size_t i = 0; i < parts.size(); i += 2) {
            pairs.push_back(i + 1 < parts.size() ? ggml_concat(ctx, parts[i], parts[i + 1], 0) : parts[i]);
        }
        parts = std::move(pairs);
    }

    graph.output(parts[0]);

    std::vector<uint8_t> all(ggml_nbytes(parts[0]));

    graph.run([&]() { ggml_backend_tensor_set(index, rows.data(), 0, ggml_nbytes(index)); });

    ggml_backend_tensor_get(parts[0], all.data(), 0, all.size());

    const uint8_t * data = all.data();

    for (const auto & read : reads) {
        const size_t size = read.size();

        convert_rows(read, cache.n_head_kv, n, [&](int64_t h, int64_t i) { return data + (h*n + i)*size; });
        data += cache.n_head_kv*n*size;
    }
}

} // namespace

void kvl_read_cells(const kvl_cache & cache, int32_t seq_id, const int32_t * cells, const kvl_rows & rows) {
    const uint32_t stream = cache.kv->get_stream(seq_id);

    const auto type_k = (ggml_type) rows.type_k;
    const auto type_v = (ggml_type) rows.type_v;

    const size_t n_k = (size_t) cache.n_head_kv*rows.n_rows*ggml_row_size(type_k, cache.n_embd_head_k);
    const size_t n_v = (size_t) cache.n_head_kv*rows.n_rows*ggml_row_size(type_v, cache.n_embd_row_v);

    cache.lctx->synchronize();

    std::map<ggml_backend_buffer_type_t, std::vector<stream_read>> elsewhere;

    // what numbers of 32 bits can tell the place of
    const bool is_small = (int64_t) cache.kv->get_size()*cache.n_head_kv <= INT32_MAX;

    const auto add = [&](const stream_read & read) {
        if (kvl_is_on_cpu(read.stream) || !is_small || read.size() % sizeof(float) != 0) {
            read_stream(read, cache.n_head_kv, cells, rows.n_rows);
        } else {
            elsewhere[ggml_backend_buffer_get_type(read.stream->view_src->buffer)].push_back(read);
        }
    };

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        const auto & layer = kvl_access::layers(*cache.kv)[i];

        add({ layer.k_stream[stream], cache.n_embd_head_k, type_k, rows.k[0] + i*n_k });
        if (layer.v) {
            add({ layer.v_stream[stream], cache.n_embd_row_v, type_v, rows.v[0] + i*n_v });
        }
    }

    for (const auto & [buft, reads] : elsewhere) {
        read_streams(cache, reads, cells, rows.n_rows);
    }
}
