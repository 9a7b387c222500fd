// kvlocal's own graphs: a scheduler beside llama.cpp's, over the same backends.

#include "kvlocal-cpu.h"
#include "kvlocal-impl.h"

#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"

#include <algorithm>
#include <map>
#include <typeinfo>

struct kvl_runtime {
    ggml_backend_sched_ptr sched;

    size_t n_nodes = 0;

    std::map<ggml_backend_buffer_type_t, ggml_backend_buffer_ptr> inputs;
};

static std::shared_ptr<kvl_runtime> get_runtime(llama_context & lctx) {
    auto & runtime = kvl_access::runtime(lctx);

    if (!runtime) {
        runtime = std::make_shared<kvl_runtime>();
    }

    return runtime;
}

ggml_backend_buffer_t kvl_input_buffer(llama_context & lctx, ggml_backend_buffer_type_t buft, size_t size) {
    auto & buffer = get_runtime(lctx)->inputs[buft];

    if (!buffer || ggml_backend_buffer_get_size(buffer.get()) < size) {
        buffer.reset();
        buffer.reset(ggml_backend_buft_alloc_buffer(buft, size));
    }
    if (!buffer) {
        throw kvl_error(KVL_ERR_MEMORY, std::string("out of memory: ") + ggml_backend_buft_name(buft) + " has no " + std::to_string(size) + " bytes left");
    }

    return buffer.get();
}

static ggml_backend_sched_t get_sched(llama_context & lctx, size_t n_nodes) {
    const auto runtime = get_runtime(lctx);

    if (runtime->n_nodes < n_nodes) {
        auto backends = kvl_access::backends(lctx);
        auto bufts    = kvl_access::bufts(lctx);

        runtime->sched.reset(ggml_backend_sched_new(backends.data(), bufts.data(), backends.size(), n_nodes, false, false));
        runtime->n_nodes = n_nodes;
    }

    return runtime->sched.get();
}

kvl_graph::kvl_graph(const kvl_cache & cache, size_t n_nodes) : cache(cache), n_nodes(n_nodes) {
    const ggml_init_params params = {
        // leaves count too, hence twice
        /*.mem_size   =*/ 2*n_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    ctx_ptr.reset(ggml_init(params));
    if (!ctx_ptr) {
        throw kvl_error(KVL_ERR_MEMORY, "out of memory for a graph");
    }

    gf = ggml_new_graph_custom(ctx_ptr.get(), n_nodes, false);
}

ggml_tensor * kvl_graph::input(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx(), type, ne0, ne1, ne2);
    ggml_set_input(t);

    return t;
}

ggml_tensor * kvl_graph::cpu_op(int64_t ne0, int64_t ne1, int64_t ne2, ggml_custom_op_t op, void * userdata) {
    ggml_tensor * t = ggml_custom_4d(ctx(), GGML_TYPE_F32, ne0, ne1, ne2, 1, nullptr, 0, op, GGML_N_TASKS_MAX, userdata);
    output(t);

    return t;
}

void kvl_graph::output(ggml_tensor * t) {
    ggml_set_output(t);
    ggml_build_forward_expand(gf, t);
}

void kvl_graph::run(const std::function<void()> & set_inputs) {
    llama_context & lctx = *cache.lctx;

    // writes into the cache happen where the cache is: no other backend can take over
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);

        if (node->op == GGML_OP_SET_ROWS) {
            auto * dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(node->src[2]->buffer ? node->src[2]->buffer : node->view_src->buffer));
            if (dev && !ggml_backend_dev_supports_op(dev, node)) {
                throw kvl_error(KVL_ERR_UNSUPPORTED, std::string("the device ") + ggml_backend_dev_name(dev) + " can't write rows of type " + ggml_type_name(node->type));
            }
        }
    }

    lctx.synchronize();

    // where nothing moves; not every backend takes an empty graph
    if (ggml_graph_n_nodes(gf) == 0) {
        set_inputs();
        return;
    }

    auto * sched = get_sched(lctx, n_nodes);

    ggml_backend_sched_reset(sched);

    if (!ggml_backend_sched_alloc_graph(sched, gf)) {
        throw kvl_error(KVL_ERR_MEMORY, "out of memory for a graph's buffers");
    }

    set_inputs();

    kvl_access::set_n_threads(lctx, lctx.n_threads_batch());

    const auto status = ggml_backend_sched_graph_compute(sched, gf);
    if (status != GGML_STATUS_SUCCESS) {
        throw kvl_error(KVL_ERR_COMPUTE, std::string("a graph could not be computed: ") + ggml_status_to_string(status));
    }
}

bool kvl_is_cache_type(int32_t type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:
            return true;
        default:
            return false;
    }
}

ggml_type kvl_type_v(const kvl_access::kv_layer & layer) {
    return layer.v ? layer.v->type : layer.k->type;
}

// where the device of a layer has no attention for the types of its cache, llama.cpp computes it elsewhere, with copies of the whole cache
static void check_attention(const kvl_cache & cache, const kvl_access::kv_layer & layer, ggml_backend_dev_t dev) {
    const ggml_init_params params = { 8*ggml_tensor_overhead(), nullptr, true };
    ggml_context_ptr ctx { ggml_init(params) };

    const int64_t n_kv = 256;

    ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, cache.n_embd_head_k, 1,    cache.n_head);
    ggml_tensor * k    = ggml_new_tensor_3d(ctx.get(), layer.k->type, cache.n_embd_head_k, n_kv, cache.n_head_kv);
    ggml_tensor * v    = ggml_new_tensor_3d(ctx.get(), kvl_type_v(layer), cache.n_embd_head_v, n_kv, cache.n_head_kv);
    ggml_tensor * mask = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_kv, 1);

    const ggml_tensor * res = ggml_flash_attn_ext(ctx.get(), q, k, v, mask, 1.0f, 0.0f, 0.0f);

    if (!ggml_backend_dev_supports_op(dev, res)) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, std::string("the device ") + ggml_backend_dev_name(dev) + " has no attention for keys of type " +
                ggml_type_name(layer.k->type) + " and values of type " + ggml_type_name(kvl_type_v(layer)) + ": use f16");
    }
}

kvl_cache kvl_find_cache(llama_context * lctx) {
    if (!lctx) {
        throw kvl_error(KVL_ERR_ARGUMENT, "the context is null");
    }

    auto * memory = lctx->get_memory();

    kvl_cache res = {};
    res.lctx = lctx;
    res.kv   = dynamic_cast<llama_kv_cache *>(memory);

    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        res.kv  = iswa->get_base();
        res.swa = iswa->get_swa();
    }

    // what is derived from it has caches beside it whose cells would have to be moved along
    if (memory && typeid(*memory) == typeid(llama_memory_hybrid)) {
        auto * hybrid = static_cast<llama_memory_hybrid *>(memory);

        res.kv   = hybrid->get_mem_attn();
        res.recr = hybrid->get_mem_recr();
    }

    if (!res.kv) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "the context has no plain KV cache: recurrent models without attention, models with a sliding window beside "
                "a recurrent state, and models with sparse or compressed attention can't be compressed: choose another model");
    }

    const auto & hparams = kvl_access::hparams(*res.kv);
    const auto & layers  = kvl_access::layers(*res.kv);

    if (layers.empty()) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "the model has no layer with a KV cache that grows");
    }
    if (hparams.is_mla() && (res.recr || res.swa)) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "models with latent attention beside a recurrent state or a sliding window can't be compressed: "
                "choose another model");
    }
    if (hparams.use_alibi) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "models with ALiBi positions can't be compressed");
    }
    if (kvl_access::v_trans(*res.kv)) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "the V cache is transposed: make the context with flash attention on");
    }
    if (kvl_access::is_shared(*res.kv)) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "the KV cache belongs to another context");
    }
    if (res.kv->get_n_stream() != res.kv->get_n_seq_max()) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "sequences share one stream: make the context with kv_unified off");
    }

    const uint32_t il = layers[0].il;

    res.n_layer       = layers.size();
    res.n_head        = hparams.n_head(il);
    res.n_head_kv     = hparams.n_head_kv(il);
    res.n_embd_head_k = hparams.n_embd_head_k(il);
    res.n_embd_head_v = hparams.is_mla() ? hparams.n_lora_kv : hparams.n_embd_head_v(il);
    res.n_embd_row_v  = hparams.is_mla() ? 0 : res.n_embd_head_v;

    for (const auto & layer : layers) {
        if ((int32_t) hparams.n_head       (layer.il) != res.n_head        ||
            (int32_t) hparams.n_head_kv    (layer.il) != res.n_head_kv     ||
            (int32_t) hparams.n_embd_head_k(layer.il) != res.n_embd_head_k ||
            (!hparams.is_mla() && (int32_t) hparams.n_embd_head_v(layer.il) != res.n_embd_head_v)) {
            throw kvl_error(KVL_ERR_UNSUPPORTED, "models whose layers differ in their heads can't be compressed");
        }

        for (const auto * t : { layer.k, layer.v }) {
            if (t && !kvl_is_cache_type(t->type)) {
                throw kvl_error(KVL_ERR_UNSUPPORTED, std::string("a KV cache of type ") + ggml_type_name(t->type) + " can't be compressed");
            }
        }

        // the rows of one head are moved alone
        if (res.n_embd_head_k % ggml_blck_size(layer.k->type) != 0 || res.n_embd_row_v % ggml_blck_size(kvl_type_v(layer)) != 0) {
            throw kvl_error(KVL_ERR_UNSUPPORTED, "the head size is no multiple of the cache type's block size: use an f16 cache");
        }
    }

    if (ggml_is_quantized(layers[0].k->type) || ggml_is_quantized(kvl_type_v(layers[0]))) {
        ggml_backend_dev_t last = nullptr;

        for (const auto & layer : layers) {
            auto * dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(layer.k->buffer));

            if (dev && dev != last) {
                check_attention(res, layer, dev);
                last = dev;
            }
        }
    }

    return res;
}

bool kvl_is_on_cpu(const ggml_tensor * t) {
    auto * buffer = t->view_src ? t->view_src->buffer : t->buffer;
    if (!buffer) {
        return false;
    }

    auto * dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));

    return !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool kvl_is_on_cpu(const kvl_cache & cache) {
    for (const auto & layer : kvl_access::layers(*cache.kv)) {
        if (!kvl_is_on_cpu(layer.k)) {
            return false;
        }
    }

    return true;
}

const kvl_cpu_kernels * kvl_find_kernels() {
    // at the first use: a portable build loads ggml-cpu after libllama
    static const kvl_cpu_kernels * kernels = []() -> const kvl_cpu_kernels * {
        auto * dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        auto * get = dev ? ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "kvl_get_cpu_kernels") : nullptr;

        return get ? ((decltype(&kvl_get_cpu_kernels)) get)() : nullptr;
    }();

    return kernels;
}

const kvl_cpu_kernels & kvl_kernels() {
    const auto * kernels = kvl_find_kernels();
    if (!kernels) {
        throw kvl_error(KVL_ERR_UNSUPPORTED, "the CPU backend that is loaded is not the one that was built with this library");
    }

    return *kernels;
}

void kvl_check_devices(const llama_context & lctx) {
    for (auto * backend : kvl_access::backends(lctx)) {
        auto * dev = ggml_backend_get_device(backend);
        auto * reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;

        // of our patches; no other backend lives on without its device
        auto * is_lost = reg ? (bool (*)(ggml_backend_dev_t)) ggml_backend_reg_get_proc_address(reg, "ggml_backend_rpc_is_lost") : nullptr;

        if (is_lost && is_lost(dev)) {
            throw kvl_error(KVL_ERR_COMPUTE, std::string("the RPC server ") + ggml_backend_dev_description(dev) +
                    " is lost, and with it a part of the model: start it again, then kvlocal; what was said is kept");
        }
    }
}

void kvl_check_seq(const kvl_cache & cache, int32_t seq_id) {
    const int32_t n_seq_max = cache.kv->get_n_seq_max();

    if (seq_id < 0 || seq_id >= n_seq_max) {
        throw kvl_error(KVL_ERR_ARGUMENT, "sequence " + std::to_string(seq_id) + " is not in [0, " + std::to_string(n_seq_max) + ")");
    }
    if (kvl_access::cells(*cache.kv, seq_id).get_has_shift()) {
        throw kvl_error(KVL_ERR_STATE, "a position shift is pending: decode once first");
    }
}

void kvl_check_shape(const kvl_cache & cache, int32_t seq_id, int32_t n_layer, int32_t n_head_kv, int32_t n_cells, bool may_be_empty) {
    kvl_check_seq(cache, seq_id);

    if (n_layer != cache.n_layer || n_head_kv != cache.n_head_kv) {
        throw kvl_error(KVL_ERR_ARGUMENT, "the arrays are for " + std::to_string(n_layer) + " layers of " + std::to_string(n_head_kv) +
                " KV heads, the cache has " + std::to_string(cache.n_layer) + " of " + std::to_string(cache.n_head_kv));
    }

    const int32_t n_used = kvl_access::cells(*cache.kv, seq_id).used_max_p1();

    if (n_cells != n_used) {
        throw kvl_error(KVL_ERR_STATE, "the cell count " + std::to_string(n_cells) + " is stale: the sequence has " + std::to_string(n_used) + " cells");
    }
    if (n_used == 0 && !may_be_empty) {
        throw kvl_error(KVL_ERR_STATE, "the sequence has no cells");
    }
}

std::vector<int32_t> kvl_cells_by_position(const kvl_cache & cache, int32_t seq_id) {
    const auto & by_pos = kvl_access::cells(*cache.kv, seq_id).seq_pos_get(seq_id);

    std::vector<int32_t> res;
    res.reserve(by_pos.size());

    for (const auto & [pos, cell] : by_pos) {
        res.push_back((int32_t) cell);
    }

    return res;
}

ggml_tensor * kvl_view_heads(ggml_context * ctx, ggml_tensor * stream, int64_t n_embd_head, int64_t n_head_kv, int64_t n_cells) {
    GGML_ASSERT(stream->ne[0] == n_embd_head*n_head_kv);

    return ggml_view_3d(ctx, stream, n_embd_head, n_cells, n_head_kv,
            stream->nb[1], ggml_row_size(stream->type, n_embd_head), 0);
}
