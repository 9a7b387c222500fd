#include "kvlocal-products.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <algorithm>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    include <immintrin.h>
#    define KVL_HAVE_PRODUCTS
#endif

#ifdef KVL_HAVE_PRODUCTS

namespace {

constexpr int     N_TOKEN   = 8;   // at once, as many as there are lanes
constexpr int64_t MAX_BLOCK = 512; // of a row: their scales are on the stack

// the scales of up to N_TOKEN tokens as floats
struct token_scales {
    float d[MAX_BLOCK][N_TOKEN];
    float s[MAX_BLOCK][N_TOKEN];
};

// the 32 numbers of a block, 0 to 15, a byte each
inline __m256i numbers_of(const block_q4_1 & block) {
    const __m128i packed = _mm_loadu_si128((const __m128i *) block.qs);
    const __m256i wide   = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
    return _mm256_and_si256(wide, _mm256_set1_epi8(15));
}

// lane i: the sum of the products 4*i .. 4*i + 3
inline __m256 products_of(__m256i x, __m256i y) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_cvtepi32_ps(_mm256_dpbusd_epi32(_mm256_setzero_si256(), x, y));
#elif defined(__AVXVNNI__)
    return _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), x, y));
#else
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1)));
#endif
}

inline float sum_of(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_extractf128_ps(v, 1), _mm256_castps256_ps128(v));
    const __m128 two  = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// one row with N tokens, tokens[t] of token t; out[t*stride] gets its product
template <int N>
inline void multiply_row(
                int64_t         n_block,
       const block_q4_1 *       row,
       const block_q8_1 * const tokens[N],
     const token_scales &       scales,
                  float *       out,
                 size_t         stride) {
    __m256 sums[N]; // of the products with the numbers
    __m256 offsets = _mm256_setzero_ps(); // lane t: of token t, the sum of the products with the blocks' smallest values
    for (int t = 0; t < N; ++t) {
        sums[t] = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < n_block; ++i) {
        const __m256i numbers = numbers_of(row[i]);
        const __m256  d       = _mm256_set1_ps(_cvtsh_ss(row[i].d));

        offsets = _mm256_fmadd_ps(_mm256_set1_ps(_cvtsh_ss(row[i].m)), _mm256_loadu_ps(scales.s[i]), offsets);

        for (int t = 0; t < N; ++t) {
            const __m256 products = products_of(numbers, _mm256_loadu_si256((const __m256i *) tokens[t][i].qs));
            sums[t] = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(scales.d[i][t])), products, sums[t]);
        }
    }
    float offset[N_TOKEN];
    _mm256_storeu_ps(offset, offsets);
    for (int t = 0; t < N; ++t) {
        out[t*stride] = sum_of(sums[t]) + offset[t];
    }
}

template <int N>
void multiply(
    const ggml_tensor * dst,
           const char * tokens,
               size_t   token_size,
              int64_t   row_begin,
              int64_t   row_end,
              int64_t   token_begin) {
    const ggml_tensor * weights = dst->src[0];
    const int64_t       n_block = weights->ne[0]/QK4_1;

    const block_q8_1 * blocks[N];
    token_scales       scales;
    for (int t = 0; t < N; ++t) {
        blocks[t] = (const block_q8_1 *) (tokens + (token_begin + t)*token_size);
    }
    for (int64_t i = 0; i < n_block; ++i) {
        for (int t = 0; t < N; ++t) {
            scales.d[i][t] = _cvtsh_ss(blocks[t][i].d);
            scales.s[i][t] = _cvtsh_ss(blocks[t][i].s);
        }
        // lanes of no token are added up as well
        std::fill_n(scales.s[i] + N, N_TOKEN - N, 0.0f);
    }
    float * out = (float *) ((char *) dst->data + token_begin*dst->nb[1]);
    for (int64_t r = row_begin; r < row_end; ++r) {
        const block_q4_1 * row = (const block_q4_1 *) ((const char *) weights->data + r*weights->nb[1]);
        multiply_row<N>(n_block, row, blocks, scales, out + r, dst->nb[1]/sizeof(float));
    }
}

} // namespace

#endif

bool kvl_mul_mat_q4_1(
    const ggml_tensor * dst,
           const void * tokens,
               size_t   token_size,
              int64_t   row_begin,
              int64_t   row_end,
              int64_t   token_begin,
              int64_t   token_end) {
#ifdef KVL_HAVE_PRODUCTS
    // nothing is gained with one token
    if (token_end - token_begin < 2 || dst->src[0]->ne[0]/QK4_1 > MAX_BLOCK || dst->ne[2] != 1 || dst->ne[3] != 1) {
        return false;
    }
    using function = void (*)(const ggml_tensor *, const char *, size_t, int64_t, int64_t, int64_t);
    static constexpr function functions[N_TOKEN] = {
        multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<8>,
    };
    for (int64_t t = token_begin; t < token_end; t += N_TOKEN) {
        const int64_t n = token_end - t < N_TOKEN ? token_end - t : N_TOKEN;
        functions[n - 1](dst, (const char *) tokens, token_size, row_begin, row_end, t);
    }
    return true;
#else
    GGML_UNUSED(dst);
    GGML_UNUSED(tokens);
    GGML_UNUSED(token_size);
    GGML_UNUSED(row_begin);
    GGML_UNUSED(row_end);
    GGML_UNUSED(token_begin);
    GGML_UNUSED(token_end);
    return false;
#endif
}
