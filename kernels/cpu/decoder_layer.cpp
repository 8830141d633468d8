#include "decoder_layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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

// y = the output of the attention heads, [tokens, query_heads * head_dim]
void attend(int isa, const LayerKernels& kernels, int threads, const DecoderLayer& of, DType dtype, const Step& step,
            void* y) {
    const int64_t tokens = step.batch * step.queries, width = of.head_dim, half = width / 2;
    const int64_t num_heads = of.query_heads + 2 * of.kv_heads;
    const Buffer normed(bytes_of(dtype, tokens * of.hidden)), states(bytes_of(dtype, tokens * num_heads * width));
    rms_norm(isa, dtype, step.x, of.norms, of.input_norm, tokens, of.hidden, of.input_epsilon, normed.at());

    const Buffer cos(bytes_of(dtype, tokens * half)), sin(bytes_of(dtype, tokens * half));
    for (int64_t t = 0; t < tokens; t += step.rotations) {
        const int64_t bytes = bytes_of(dtype, step.rotations * half);
        std::memcpy(cos.at(bytes_of(dtype, t * half)), step.cos, bytes);
        std::memcpy(sin.at(bytes_of(dtype, t * half)), step.sin, bytes);
    }
    const AttentionInputs inputs{{of.query, of.key, of.value},
                                 {of.query_bias, of.key_bias, of.value_bias},
                                 {of.query_heads, of.kv_heads, of.kv_heads},
                                 of.dense,
                                 of.dense_bias,
                                 of.hidden,
                                 width,
                                 cos.at(),
                                 sin.at()};
    attention_inputs(kernels.dense, threads, inputs, dtype, normed.at(), tokens, states.at());

    const auto state = [&](int64_t token, int64_t head) {
        return states.at(bytes_of(dtype, (token * num_heads + head) * width));
    };
    const auto keep = [&](const View& view, int64_t token, int64_t head, const void* from) {
        const int64_t place = step.keys - step.queries + token % step.queries;
        const int64_t at = token / step.queries * view.batch + head * view.head + place * view.token;
        std::memcpy(static_cast<uint8_t*>(view.data) + bytes_of(dtype, at), from, bytes_of(dtype, width));
    };
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t head = 0; head < of.kv_heads; ++head) {
            keep(step.k, t, head, state(t, of.query_heads + head));
            keep(step.v, t, head, state(t, of.query_heads + of.kv_heads + head));
        }

    std::vector<float> sinks(of.query_heads), lse(tokens * of.query_heads);
    load_floats(of.sinks, of.sinks_dtype, 0, of.query_heads, sinks.data());
    Attention attention{};
    attention.batch = step.batch;
    attention.query_heads = of.query_heads;
    attention.kv_heads = of.kv_heads;
    attention.queries = step.queries;
    attention.keys = step.keys;
    attention.head_dim = width;
    attention.window = attention.reach = of.window ? std::min(of.window, step.keys) : step.keys;
    attention.documents = step.documents;
    attention.sinks = sinks.data();
    attention.lse = lse.data();
    attention.q = {states.at(), step.queries * num_heads * width, width, num_heads * width};
    attention.k = step.k;
    attention.v = step.v;
    const int64_t out = of.query_heads * width;
    attention.out = {y, step.queries * out, width, out};
    attention.scaling = of.scaling;
    attention_forward(kernels.attention, threads, attention);
}

}  // namespace

void decoder_layer(int isa, const LayerKernels& kernels, int threads, const DecoderLayer& of, DType dtype,
                   const Step& step) {
    const int64_t tokens = step.batch * step.queries, hidden = of.hidden, width = of.query_heads * of.head_dim;
    const Buffer heads(bytes_of(dtype, tokens * width));
    attend(isa, kernels, threads, of, dtype, step, heads.at());

    const Buffer y(bytes_of(dtype, tokens * hidden)), normed(bytes_of(dtype, tokens * hidden));
    const Weight projection{of.dense, of.projection, nullptr, hidden, width};
    few_rows_linear(kernels.dense, threads, projection, dtype, heads.at(), tokens, of.projection_bias, of.dense_bias,
                    y.at());
    add(dtype, step.x, tokens * hidden, y.at());
    rms_norm(isa, dtype, y.at(), of.norms, of.norm, tokens, hidden, of.epsilon, normed.at());

    const Buffer router_out(bytes_of(dtype, tokens * of.num_experts));
    const Weight router{of.dense, of.router, nullptr, of.num_experts, hidden};
    // It is so small that another thread would wake up after it is done.
    few_rows_linear(kernels.dense, 1, router, dtype, normed.at(), tokens, of.router_bias, of.dense_bias,
                    router_out.at());
    std::vector<float> logits(of.num_experts);
    int64_t experts[kMixtureRows];
    float weights[kMixtureRows];
    for (int64_t t = 0; t < tokens; ++t) {
        load_floats(router_out.at(), dtype, t * of.num_experts, of.num_experts, logits.data());
        choose(logits.data(), of.num_experts, of.choices, dtype, experts + t * of.choices, weights + t * of.choices);
    }
    const Experts up{kMXFP4, of.gate_up, of.gate_up_scales, nullptr, of.num_experts, 2 * of.intermediate, hidden};
    const Experts back{kMXFP4, of.down, of.down_scales, nullptr, of.num_experts, hidden, of.intermediate};
    const Mixture block{up, back, of.gate_up_bias, of.down_bias, of.expert_bias, of.alpha, of.limit};
    mixture(kernels.packed, kernels.elementwise, threads, block, dtype, normed.at(), experts, weights, tokens,
            of.choices, step.out);
    add(dtype, y.at(), tokens * hidden, step.out);
}

}  // namespace gptoss_ft
