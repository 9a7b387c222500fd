// Compaction: per layer and head, gather the kept cells to the front of the stream and free the rest.

#include "kvlocal-impl.h"

#include <cmath>
#include <cstring>
#include <numeric>

// re-rotate gathered keys, k: F32 [n_embd_head_k, n_keep, n_head_kv], by delta positions, delta: I32 [n_keep*n_head_kv]
static ggml_tensor * build_rotate(
      const kvl_cache & cache,
         ggml_context * ctx,
          ggml_tensor * k,
          ggml_tensor * delta,
          ggml_tensor * hadamard,
             uint32_t   il) {
    const auto & hparams = kvl_access::hparams(*cache.kv);
    const auto & cparams = cache.lctx->get_cparams();
    const auto & model   = cache.lctx->get_model();

    const float freq_base  = model.get_rope_freq_base (cparams, il);
    const float freq_scale = model.get_rope_freq_scale(cparams, il);

    // the keys carry YaRN's magnitude already: the second rotation must not apply it again
    const float attn_factor = cparams.yarn_ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/freq_scale)) : 1.0f;

    const int64_t n_keep = k->ne[1];
    const int64_t n_head = k->ne[2];

    if (hadamard) {
        k = llama_mul_mat_hadamard(ctx, k, hadamard);
    }

    // every row of every head is a token of its own here: [n_embd_head_k, 1, n_keep*n_head_kv]
    k = ggml_reshape_3d(ctx, k, k->ne[0], 1, n_keep*n_head);

    k = ggml_rope_ext(ctx, k, delta, model.get_rope_factors(cparams, il), hparams.n_rot(il), hparams.rope_type,
            cparams.n_ctx_orig_yarn, freq_base, freq_scale,
            cparams.yarn_ext_factor, attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

    k = ggml_reshape_3d(ctx, k, k->ne[0], n_keep, n_head);

    if (hadamard) {
        k = llama_mul_mat_hadamard(ctx, k, hadamard);
    }

    return k;
}

// rows of the heads in place, for sources in ascending order: no row is overwritten before it was read
// dst: a dummy; its sources: keys and values of a stream, indices I32 [n_keep, n_head_kv]
static void move_rows(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);

    const ggml_tensor * idx = dst->src[2];

    const int64_t n_keep = idx->ne[0];
    const int64_t n_head = idx->ne[1];

    for (int64_t u = ith; u < 2*n_head; u += nth) {
        const ggml_tensor * stream = dst->src[u/n_head];

        const int64_t h    = u%n_head;
        const size_t  size = stream->nb[1]/n_head;

        const int32_t * from = (const int32_t *) idx->data + h*n_keep;
        char          * rows = (char *) stream->data + h*size;

        for (int64_t j = 0; j < n_keep; ++j) {
            if (from[j] != j) {
                memcpy(rows + j*stream->nb[1], rows + from[j]*stream->nb[1], size);
            }
        }
    }
}

static bool is_ascending(const int32_t * gather, size_t n_rows, int32_t n_keep) {
    for (size_t i = 0; i < n_rows; ++i) {
        const int32_t * row = gather + i*n_keep;

        for (int32_t j = 1; j < n_keep; ++j) {
            if (row[j] <= row[j - 1]) {
                return false;
            }
        }
    }

    return true;
}

void kvl_compact_cells(const kvl_cache & cache, int32_t seq_id, const int32_t * gather, const int32_t * pos, const int32_t * delta, int32_t n_keep) {
    const auto & hparams = kvl_access::hparams(*cache.kv);

    auto & cells = kvl_access::cells(*cache.kv, seq_id);

    const int32_t  n_cells = cells.used_max_p1();
    const uint32_t stream  = cache.kv->get_stream(seq_id);

    const size_t n_idx = (size_t) cache.n_head_kv*n_keep;

    const bool in_place = !delta && kvl_is_on_cpu(cache) && is_ascending(gather, (size_t) cache.n_layer*cache.n_head_kv, n_keep);

    {
        kvl_graph graph(cache, 32*cache.n_layer + 64);

        auto * ctx = graph.ctx();

        // all heads are scattered to the same rows
        ggml_tensor * dst = in_place ? nullptr : graph.input(GGML_TYPE_I64, n_keep);

        ggml_tensor * hadamard = delta ? cache.kv->build_input_k_rot(ctx) : nullptr;

        std::vector<ggml_tensor *> idxs;
        std::vector<ggml_tensor *> deltas;

        for (const auto & layer : kvl_access::layers(*cache.kv)) {
            ggml_tensor * idx = graph.input(GGML_TYPE_I32, n_keep, cache.n_head_kv);
            ggml_tensor * dlt = delta && hparams.has_rope(layer.il) ? graph.input(GGML_TYPE_I32, n_keep*cache.n_head_kv) : nullptr;

            idxs  .push_back(idx);
            deltas.push_back(dlt);

            if (in_place) {
                ggml_tensor * args[] = { layer.k_stream[stream], layer.v_stream[stream], idx };
                graph.expand(ggml_custom_4d(ctx, GGML_TYPE_I32, 1, 1, 1, 1, args, 3, move_rows, GGML_N_TASKS_MAX, nullptr));
                continue;
            }

            ggml_tensor * k = kvl_view_heads(ctx, layer.k_stream[stream], cache.n_embd_head_k, cache.n_head_kv, n_cells);
            ggml_tensor * v = kvl_view_heads(ctx, layer.v_stream[stream], cache.n_embd_head_v, cache.n_head_kv, n_cells);

            ggml_tensor * k_keep = ggml_get_rows(ctx, k, idx); // F32 [n_embd_head_k, n_keep, n_head_kv]
            ggml_tensor * v_keep = ggml_get_rows(ctx, v, idx); // F32 [n_embd_head_v, n_keep, n_head_kv]

            if (dlt) {
                k_keep = build_rotate(cache, ctx, k_keep, dlt, hadamard, layer.il);
            }

            graph.expand(ggml_set_rows(ctx, k, k_keep, dst));
            graph.expand(ggml_set_rows(ctx, v, v_keep, dst));
        }

        graph.run([&]() {
            if (dst) {
                std::vector<int64_t> rows(n_keep);
                std::iota(rows.begin(), rows.end(), 0);
                ggml_backend_tensor_set(dst, rows.data(), 0, ggml_nbytes(dst));
            }

            if (hadamard && hadamard->buffer) {
                cache.kv->set_input_k_rot(hadamard);
            }

            for (int32_t i = 0; i < cache.n_layer; ++i) {
                ggml_backend_tensor_set(idxs[i], gather + i*n_idx, 0, ggml_nbytes(idxs[i]));
                if (deltas[i]) {
                    ggml_backend_tensor_set(deltas[i], delta + i*n_idx, 0, ggml_nbytes(deltas[i]));
                }
            }
        });
    }

    for (int32_t i = 0; i < n_cells; ++i) {
        if (!cells.is_empty(i)) {
            cells.rm(i);
        }
    }

    for (int32_t j = 0; j < n_keep; ++j) {
        cells.pos_set(j, pos[j]);
        cells.seq_add(j, seq_id);
    }

    kvl_access::head(*cache.kv, seq_id) = n_keep;

    if (delta) {
        kvl_ring_invalidate(kvl_access::ring(*cache.kv).get(), seq_id);

        // a rotation is rare and its buffers are the largest: they are not kept
        kvl_access::runtime(*cache.lctx).reset();
    }
}
