// gpt-oss's whole expert block for the few tokens of a step of generation, which wait for the weights: one wake-up of the
// threads for all of it, and no sorting or copying around the products.
#pragma once

#include <cstdint>

#include "experts.h"
#include "grouped.h"

namespace gptoss_ft {

constexpr int64_t kMixtureRows = 16;  // tokens times choices, at most

struct Mixture {
    Experts gate_up, down;  // MXFP4; `ends` is not used
    const void *gate_up_bias, *down_bias;
    DType bias_dtype;
    float alpha, limit;
};

// out[t] = sum over k of weights[t, k] * (swiglu(hidden[t] U^T + a) D^T + b), where U, a, D and b are those of expert
// experts[t, k]. The projections and the activation are rounded to `dtype`, so that the bits are those of grouped_linear,
// swiglu and combine.
void mixture(const Kernels&, const ExpertKernels&, int threads, const Mixture&, DType dtype, const void* hidden,
             const int64_t* experts, const float* weights, int64_t tokens, int64_t choices, void* out);

}  // namespace gptoss_ft
