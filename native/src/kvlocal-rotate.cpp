// Rotation: keys and queries as they are at other positions.

#include "kvlocal-impl.h"

#include <cmath>

ggml_tensor * kvl_build_k_rot(const kvl_cache & cache, ggml_context * ctx) {
    // llama.cpp leaves out the multiplication where values are parts of the keys, though it may have the matrix
    return cache.n_embd_row_v ? cache.kv->build_input_k_rot(ctx) : nullptr;
}

ggml_tensor * kvl_build_rotate(const kvl_cache & cache, ggml_context * ctx, ggml_tensor * x, ggml_tensor * delta, ggml_tensor * hadamard, uint32_t il) {
    const auto & hparams = kvl_access::hparams(*cache.kv);
    const auto & cparams = cache.lctx->get_cparams();
    const auto & model   = cache.lctx->get_model();

    const float freq_base  = model.get_rope_freq_base (cparams, il);
    const float freq_scale = model.get_rope_freq_scale(cparams, il);

    // what was rotated once carries YaRN's magnitude already: the second rotation must not apply it again
    const float attn_factor = cparams.yarn_ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/freq_scale)) : 1.0f;

    if (hadamard) {
        x = llama_mul_mat_hadamard(ctx, x, hadamard);
    }

    const int64_t n = x->ne[1];

    // every row is a token of its own, or all are heads of one
    x = delta->ne[0] == 1 ? ggml_reshape_3d(ctx, x, x->ne[0], n, 1) : ggml_reshape_3d(ctx, x, x->ne[0], 1, n);

    // where keys are made from a latent vector the numbers that are rotated are the last ones, as llama_kv_cache::build_graph_shift has it
    const int64_t n_rot   = hparams.n_rot(il);
    const int64_t n_plain = hparams.n_lora_kv > 0 ? x->ne[0] - n_rot : 0;

    ggml_tensor * plain = n_plain > 0 ? ggml_view_3d(ctx, x, n_plain, x->ne[1], x->ne[2], x->nb[1], x->nb[2], 0) : nullptr;

    if (plain) {
        x = ggml_view_3d(ctx, x, n_rot, x->ne[1], x->ne[2], x->nb[1], x->nb[2], ggml_row_size(x->type, n_plain));
    }

    x = ggml_rope_ext(ctx, x, delta, model.get_rope_factors(cparams, il), n_rot, hparams.rope_type,
            cparams.n_ctx_orig_yarn, freq_base, freq_scale,
            cparams.yarn_ext_factor, attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

    if (plain) {
        x = ggml_concat(ctx, plain, x, 0);
    }

    x = ggml_reshape_2d(ctx, x, x->ne[0], n);

    if (hadamard) {
        x = llama_mul_mat_hadamard(ctx, x, hadamard);
    }

    return x;
}
