#include "layer_output.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "buffer.h"
#include "few_rows.h"
#include "norm_rows.h"

namespace gptoss_ft {
namespace {

float rounded(float value, DType dtype) { return dtype == kBFloat16 ? float_from_bf16(bf16_from_float(value)) : value; }

// out += x
void add(DType dtype, const void* x, int64_t count, void* out) {
    if (dtype == kBFloat16) {
        const auto* from = static_cast<const uint16_t*>(x);
        auto* to = static_cast<uint16_t*>(out);
        for (int64_t i = 0; i < count; ++i) to[i] = bf16_from_float(float_from_bf16(to[i]) + float_from_bf16(from[i]));
    } else {
        for (int64_t i = 0; i < count; ++i) static_cast<float*>(out)[i] += static_cast<const float*>(x)[i];
    }
}

// The numbers of the highest logits, of equal ones the first, and their softmax. NaN counts as the highest.
void choose(const float* logits, int64_t count, int64_t choices, DType dtype, int64_t* experts, float* weights) {
    const auto rank = [&](int64_t i) {
        return std::isnan(logits[i]) ? std::numeric_limits<float>::infinity() : logits[i];
    };
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + choices, order.end(), [&](int64_t a, int64_t b) {
        return rank(a) != rank(b) ? rank(a) > rank(b) : a < b;
    });
    float total = 0;
    for (int64_t k = 0; k < choices; ++k) {
        experts[k] = order[k];
        total += weights[k] = std::exp(logits[order[k]] - logits[order[0]]);
    }
    for (int64_t k = 0; k < choices; ++k) weights[k] = rounded(weights[k] / total, dtype);
}

}  // namespace

void layer_output(int isa, const Kernels& dense, const Kernels& packed, const ExpertKernels& elementwise, int threads,
                  const LayerOutput& of, DType dtype, const void* heads, const void* residual, int64_t tokens,
                  void* out) {
    const int64_t hidden = of.projection.rows, num_experts = of.router.rows;
    const Buffer y(bytes_of(dtype, tokens * hidden)), normed(bytes_of(dtype, tokens * hidden));
    few_rows_linear(dense, threads, of.projection, dtype, heads, tokens, of.projection_bias, of.bias_dtype, y.at());
    add(dtype, residual, tokens * hidden, y.at());
    rms_norm(isa, dtype, y.at(), of.norm_dtype, of.norm, tokens, hidden, of.epsilon, normed.at());

    const Buffer router_out(bytes_of(dtype, tokens * num_experts));
    // It is so small that another thread would wake up after it is done.
    few_rows_linear(dense, 1, of.router, dtype, normed.at(), tokens, of.router_bias, of.bias_dtype, router_out.at());
    std::vector<float> logits(num_experts);
    int64_t experts[kMixtureRows];
    float weights[kMixtureRows];
    for (int64_t t = 0; t < tokens; ++t) {
        load_floats(router_out.at(), dtype, t * num_experts, num_experts, logits.data());
        choose(logits.data(), num_experts, of.choices, dtype, experts + t * of.choices, weights + t * of.choices);
    }
    mixture(packed, elementwise, threads, of.mixture, dtype, normed.at(), experts, weights, tokens, of.choices, out);
    add(dtype, y.at(), tokens * hidden, out);
}

}  // namespace gptoss_ft
