// Attention of single tokens on the CPU: where llama.cpp's graphs take it instead of ggml's.

#include "kvlocal-cpu.h"
#include "kvlocal-impl.h"

#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"

namespace {

// lives as long as the graph: graph results own their inputs
struct attention : llm_graph_input_i {
    kvl_cpu_attention task;

    attention(float scale, int n_parts) : task(scale, n_parts) {}

    void set_input(const llama_ubatch *) override {}

    bool can_reuse(const llm_graph_params & params) override { return task.n_parts == parts(params.cparams); }

    // one per thread; one thread merges them, so there is a limit
    static int parts(const llama_cparams & cparams) {
        return std::min(std::max(cparams.n_threads, cparams.n_threads_batch), 32);
    }
};

// of a cache
bool is_half_on_cpu(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F16 && t->nb[0] == sizeof(ggml_fp16_t) && t->ne[0]%16 == 0 && t->ne[0] <= 256 && kvl_is_on_cpu(t);
}

} // namespace

ggml_tensor * kvl_attention(
                ggml_context * ctx,
            llm_graph_result * res,
         const llama_hparams & hparams,
         const llama_cparams & cparams,
                 ggml_tensor * q,
                 ggml_tensor * k,
                 ggml_tensor * v,
                 ggml_tensor * kq_mask,
                 ggml_tensor * sinks,
                 ggml_tensor * v_mla,
                       float   kq_scale) {
    constexpr int64_t MAX_TOKENS = 63; // per stream; from 64 on ggml works with tiles in float32 too

    const auto * kernels = kvl_find_kernels();

    if (!kernels || !kernels->attention || !cparams.kvl_attention || !cparams.flash_attn || hparams.attn_soft_cap || hparams.f_max_alibi_bias > 0.0f || sinks || v_mla) {
        return nullptr;
    }
    if (!is_half_on_cpu(k) || !is_half_on_cpu(v)) {
        return nullptr;
    }
    if (v->ne[2] != k->ne[2] || q->ne[2]%k->ne[2] != 0 || k->ne[3] != q->ne[3] || v->ne[3] != q->ne[3]) {
        return nullptr;
    }
    if (q->ne[1] > MAX_TOKENS || q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float)) {
        return nullptr;
    }
    if (!kq_mask || kq_mask->type != GGML_TYPE_F16 || kq_mask->ne[0] != k->ne[1] || kq_mask->ne[1] != q->ne[1] || kq_mask->ne[2] != 1 || kq_mask->ne[3] != q->ne[3]) {
        return nullptr;
    }

    auto * op = (attention *) res->add_input(std::make_unique<attention>(kq_scale, attention::parts(cparams)));

    const int64_t d      = v->ne[0];
    const int64_t n_rows = q->ne[1]*q->ne[2]*q->ne[3];

    ggml_tensor * args[] = { q, k, v, kq_mask };

    ggml_tensor * cur = ggml_custom_4d(ctx, GGML_TYPE_F32, n_rows*(d + op->task.n_parts*(kvl_cpu_attention::HEADER + d)), 1, 1, 1,
            args, 4, kernels->attention, GGML_N_TASKS_MAX, &op->task);

    // as ggml_flash_attn_ext returns it
    return ggml_view_4d(ctx, cur, d, q->ne[2], q->ne[1], q->ne[3],
            d*sizeof(float), d*q->ne[2]*sizeof(float), d*q->ne[2]*q->ne[1]*sizeof(float), 0);
}
