// Rows of cells in host memory: keys and values as they are stored, or in another type.

#include "kvlocal-impl.h"

#include <algorithm>
#include <cstring>

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

// out: [n_head_kv, n] rows of type, n_embd numbers each
static void read_stream(const ggml_tensor * stream, int64_t n_head_kv, int64_t n_embd, const int32_t * cells, int64_t n, std::vector<uint8_t> & staged, ggml_type type, uint8_t * out) {
    const auto [first, last] = std::minmax_element(cells, cells + n);

    const size_t step  = stream->nb[1];
    const size_t begin = *first*step;

    const uint8_t * data;

    if (kvl_is_on_cpu(stream)) {
        data = (const uint8_t *) stream->data + begin;
    } else {
        // one transfer takes less than one for each cell
        staged.resize((*last - *first + 1)*step);
        ggml_backend_tensor_get(stream, staged.data(), begin, staged.size());
        data = staged.data();
    }

    kvl_row_conversion convert(stream->type, type, n_embd);

    const size_t size     = ggml_row_size(stream->type, n_embd);
    const size_t size_out = ggml_row_size(type, n_embd);

    for (int64_t h = 0; h < n_head_kv; ++h) {
        for (int64_t i = 0; i < n; ++i, out += size_out) {
            convert(data + (cells[i] - *first)*step + h*size, out);
        }
    }
}

void kvl_read_cells(const kvl_cache & cache, int32_t seq_id, const int32_t * cells, const kvl_rows & rows) {
    const uint32_t stream = cache.kv->get_stream(seq_id);

    const auto type_k = (ggml_type) rows.type_k;
    const auto type_v = (ggml_type) rows.type_v;

    const size_t n_k = (size_t) cache.n_head_kv*rows.n_rows*ggml_row_size(type_k, cache.n_embd_head_k);
    const size_t n_v = (size_t) cache.n_head_kv*rows.n_rows*ggml_row_size(type_v, cache.n_embd_row_v);

    cache.lctx->synchronize();

    std::vector<uint8_t> staged;

    for (int32_t i = 0; i < cache.n_layer; ++i) {
        const auto & layer = kvl_access::layers(*cache.kv)[i];

        read_stream(layer.k_stream[stream], cache.n_head_kv, cache.n_embd_head_k, cells, rows.n_rows, staged, type_k, rows.k[0] + i*n_k);
        if (layer.v) {
            read_stream(layer.v_stream[stream], cache.n_head_kv, cache.n_embd_row_v, cells, rows.n_rows, staged, type_v, rows.v[0] + i*n_v);
        }
    }
}
