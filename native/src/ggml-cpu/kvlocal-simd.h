// Vectors of floats as wide as the registers of the machine this is compiled for.

#pragma once

#include "ggml.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__F16C__)
#    include <immintrin.h>
#elif defined(__aarch64__)
#    include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

#if defined(__AVX512F__) || defined(__F16C__) || defined(__aarch64__)
constexpr bool LOADS_HALF = true; // in one instruction
#else
constexpr bool LOADS_HALF = false;
#endif

typedef float   vector  __attribute__((vector_size(LANES*sizeof(float))));
typedef int32_t ivector __attribute__((vector_size(LANES*sizeof(int32_t))));

inline vector load(const float * p) {
    vector v;
    memcpy(&v, p, sizeof(v));
    return v;
}

inline void store(float * p, vector v) {
    memcpy(p, &v, sizeof(v));
}

// the LANES half precision numbers at p
inline vector load_half(const void * p) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *) p));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
#elif defined(__aarch64__)
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) p)));
#else
    vector x;
    for (int64_t t = 0; t < LANES; ++t) {
        x[t] = ggml_fp16_to_fp32(((const ggml_fp16_t *) p)[t]);
    }
    return x;
#endif
}

inline vector larger(vector a, vector b) {
    return a > b ? a : b;
}

// lanes FIRST, FIRST + STEP, ... of a and b, one behind the other
template <int FIRST, int STEP, int... I>
inline vector pick(vector a, vector b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, ((FIRST + STEP*I)%(2*LANES))...);
#else
    return __builtin_shuffle(a, b, ivector{((FIRST + STEP*I)%(2*LANES))...});
#endif
}

template <int FIRST, int STEP>
inline vector pick(vector a, vector b) {
    return pick<FIRST, STEP>(a, b, std::make_integer_sequence<int, LANES>());
}

inline float sum_of(vector v) {
    float res = 0.0f;
    for (int64_t t = 0; t < LANES; ++t) {
        res += v[t];
    }
    return res;
}

// lane i: the sum of v[i]; overwrites v
inline vector sums_of(vector (&v)[LANES]) {
    for (int64_t n = LANES; n > 1; n /= 2) {
        for (int64_t i = 0; i < n/2; ++i) {
            v[i] = pick<0, 2>(v[2*i], v[2*i + 1]) + pick<1, 2>(v[2*i], v[2*i + 1]);
        }
    }
    return v[0];
}

// lane j of vector i becomes lane i of vector j
inline void transpose(vector (&v)[LANES]) {
    vector w[LANES];

    for (int64_t n = LANES; n > 1; n /= 2) {
        for (int64_t i = 0; i < LANES/2; ++i) {
            w[i]           = pick<0, 2>(v[2*i], v[2*i + 1]);
            w[i + LANES/2] = pick<1, 2>(v[2*i], v[2*i + 1]);
        }
        std::copy(w, w + LANES, v);
    }
}

template <int N = LANES/2>
inline float largest_of(vector v) {
    v = larger(v, pick<N, 1>(v, v));
    if constexpr (N > 1) {
        return largest_of<N/2>(v);
    } else {
        return v[0];
    }
}

// e^x for x <= 0, within 3e-6 of it; 0 below -87
inline vector exp_of(vector x) {
    const vector  t = x < -87.0f ? vector{} - 87.0f : x;
    const ivector n = __builtin_convertvector(t*1.44269504f - 0.5f, ivector); // rounds, because t is not positive
    const vector  m = __builtin_convertvector(n, vector);
    const vector  f = t - m*0.693359375f + m*2.12194440e-4f; // ln 2 in two parts

    const vector p = 1.0f + f*(1.0f + f*(0.5f + f*(1.0f/6 + f*(1.0f/24 + f*(1.0f/120)))));

    const ivector bits = (n + 127) << 23; // 2^n

    vector power;
    memcpy(&power, &bits, sizeof(power));

    return x < -87.0f ? vector{} : p*power;
}

} // namespace
