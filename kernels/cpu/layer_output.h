// What follows attention in a layer of gpt-oss, for the few tokens of a step of generation.
#pragma once

#include <cstdint>

#include "mixture.h"

namespace gptoss_ft {

// Dense weights and their biases are of one type each.
struct LayerOutput {
    Weight projection, router;
    const void *projection_bias, *router_bias;
    DType bias_dtype;
    const void* norm;  // [hidden], of type `norm_dtype`
    DType norm_dtype;
    float epsilon;
    int64_t choices;  // experts of a token
    Mixture mixture;
};

// y = residual + heads P^T + p, and out = y + mixture(n) with n = rms_norm(y), in which a token's experts are those of
// the highest logits n R^T + r, weighted by the softmax of these. Everything is rounded to `dtype` where separate
// operations would round it.
void layer_output(int isa, const Kernels& dense, const Kernels& packed, const ExpertKernels&, int threads,
                  const LayerOutput&, DType dtype, const void* heads, const void* residual, int64_t tokens, void* out);

}  // namespace gptoss_ft
