// Dense products of the few tokens of a step of generation, which wait for the weights.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gptoss_ft {

constexpr int64_t kMaxHeadDim = 256;

// y[t] = x[t] W^T + bias, with the bits of grouped_linear. `bias` [rows of W] of type `bias_dtype`, or null.
void few_rows_linear(const Kernels&, int threads, const Weight&, DType dtype, const void* x, int64_t tokens,
                     const void* bias, DType bias_dtype, void* y);

// The projections of queries, keys and values from the same inputs: [heads * head_dim, in] with biases of one type.
struct AttentionInputs {
    const uint8_t* weights[3];
    const void* biases[3];
    int64_t heads[3];
    DType weight_dtype, bias_dtype;
    int64_t in, head_dim;
    const void *cos, *sin;  // [tokens, head_dim / 2], of the type of x
};

// y[t] [heads, head_dim]: queries and keys rotated by cos[t] and sin[t], and values, side by side. Nothing is rounded
// before it is rotated.
void attention_inputs(const Kernels&, int threads, const AttentionInputs&, DType dtype, const void* x, int64_t tokens,
                      void* y);

}  // namespace gptoss_ft
