// What the patched ggml-cpu.c sees of kvlocal: products of Q4_1 weights with several tokens at once.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Rows row_begin .. row_end - 1 of a matrix product, for the tokens token_begin .. token_end - 1.
//
// Each weight is unpacked once for up to eight tokens, and what is added up in which order is what ggml_vec_dot_q4_1_q8_1 adds up: the values
// are the same, however many tokens there are.
//
// dst:    the product, F32; its weights are Q4_1
// tokens: all tokens of src1 as Q8_1, token_size bytes from one to the next
//
// Returns false where there is no code for this machine or this product, and nothing was computed.
bool kvl_mul_mat_q4_1(
    const struct ggml_tensor * dst,
                  const void * tokens,
                      size_t   token_size,
                     int64_t   row_begin,
                     int64_t   row_end,
                     int64_t   token_begin,
                     int64_t   token_end);

#ifdef __cplusplus
}
#endif
