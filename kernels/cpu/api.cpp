// The C interface, called through ctypes with the addresses of contiguous tensors. Callers check shapes.
#include <cstdint>
#include <new>

#include "attention.h"
#include "decoder_layer.h"
#include "experts.h"
#include "few_rows.h"
#include "grouped.h"
#include "mixture.h"
#include "parallel.h"

using namespace gptoss_ft;

namespace {

enum Status : int { kOk = 0, kNoMemory = 1 };

const Kernels& kernels_for(Isa isa, DType activations, DType weights) {
#ifdef GPTOSS_FT_X86
    if (isa == kAvx512Bf16) return avx512_kernels(activations, weights);
    if (isa == kAvx2) return avx2_kernels(activations, weights);
#endif
    (void)isa;
    return portable_kernels(activations, weights);
}

const AttentionKernels& attention_for(Isa isa, DType dtype) {
#ifdef GPTOSS_FT_X86
    if (isa == kAvx512Bf16) return avx512_attention(dtype);
    if (isa == kAvx2) return avx2_attention(dtype);
#endif
    (void)isa;
    return portable_attention(dtype);
}

const ExpertKernels& experts_for(int isa, int activations, int factors) {
#ifdef GPTOSS_FT_X86
    if (isa == kAvx512Bf16) return avx512_experts(DType(activations), DType(factors));
    if (isa == kAvx2) return avx2_experts(DType(activations), DType(factors));
#endif
    (void)isa;
    return portable_experts(DType(activations), DType(factors));
}

template <class Body>
int status_of(const Body& body) {
    try {
        body();
        return kOk;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Digest of the sources that this was built from, which CMakeLists.txt computes.
EXPORT const char* gptoss_ft_sources() { return GPTOSS_FT_SOURCES; }

// The value of Isa that suits this processor best; it supports all lower ones too.
EXPORT int gptoss_ft_best_isa() {
#ifdef GPTOSS_FT_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
    // VBMI came with the second processors that have BF16; the first, Cooper Lake, uses AVX2.
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) return kAvx512Bf16;
    return kAvx2;
#else
    return kPortable;
#endif
}

// `out` [num_blocks, 32]
EXPORT int gptoss_ft_decode(int isa, int threads, int dtype, const uint8_t* blocks, const uint8_t* scales,
                            int64_t num_blocks, void* out) {
    return status_of([&] {
        const Kernels& kernels = kernels_for(Isa(isa), DType(dtype), kMXFP4);
        constexpr int64_t run = 4096;
        for_each_item(threads, (num_blocks + run - 1) / run, 1, [&] {
            return [&](int64_t item) {
                const int64_t first = item * run, count = num_blocks - first < run ? num_blocks - first : run;
                kernels.decode(blocks + first * kBlockBytes, scales + first, count,
                               static_cast<uint8_t*>(out) + bytes_of(DType(dtype), first * kBlock));
            };
        });
    });
}

EXPORT int gptoss_ft_grouped_linear(int isa, int threads, int dtype, const void* x, int weight_dtype,
                                    const uint8_t* weights, const uint8_t* scales, const void* bias, int bias_dtype,
                                    const int64_t* ends, int64_t num_experts, int64_t out, int64_t in, void* y) {
    return status_of([&] {
        const Experts experts{DType(weight_dtype), weights, scales, ends, num_experts, out, in};
        grouped_linear(kernels_for(Isa(isa), DType(dtype), experts.type), threads, experts, DType(dtype), x, bias,
                       DType(bias_dtype), y);
    });
}

EXPORT int gptoss_ft_grouped_linear_dx(int isa, int threads, int dtype, const void* dy, int weight_dtype,
                                       const uint8_t* weights, const uint8_t* scales, const int64_t* ends,
                                       int64_t num_experts, int64_t out, int64_t in, void* dx) {
    return status_of([&] {
        const Experts experts{DType(weight_dtype), weights, scales, ends, num_experts, out, in};
        grouped_linear_dx(kernels_for(Isa(isa), DType(dtype), experts.type), threads, experts, DType(dtype), dy, dx);
    });
}

EXPORT int gptoss_ft_few_rows_linear(int isa, int threads, int dtype, const void* x, int64_t tokens, int weight_dtype,
                                     const uint8_t* weight, const void* bias, int bias_dtype, int64_t out, int64_t in,
                                     void* y) {
    return status_of([&] {
        few_rows_linear(kernels_for(Isa(isa), DType(dtype), DType(weight_dtype)), threads,
                        {DType(weight_dtype), weight, nullptr, out, in}, DType(dtype), x, tokens, bias,
                        DType(bias_dtype), y);
    });
}

EXPORT int gptoss_ft_attention_inputs(int isa, int threads, int dtype, const void* x, int64_t tokens, int weight_dtype,
                                      int bias_dtype, const uint8_t* query, const void* query_bias,
                                      int64_t query_heads, const uint8_t* key, const void* key_bias, int64_t key_heads,
                                      const uint8_t* value, const void* value_bias, int64_t value_heads, int64_t in,
                                      int64_t head_dim, const void* cos, const void* sin, void* y) {
    return status_of([&] {
        const AttentionInputs of{{query, key, value},
                                 {query_bias, key_bias, value_bias},
                                 {query_heads, key_heads, value_heads},
                                 DType(weight_dtype),
                                 DType(bias_dtype),
                                 in,
                                 head_dim,
                                 cos,
                                 sin};
        attention_inputs(kernels_for(Isa(isa), DType(dtype), DType(weight_dtype)), threads, of, DType(dtype), x, tokens,
                         y);
    });
}

EXPORT int gptoss_ft_attention_forward(int isa, int threads, int dtype, const Attention* attention) {
    return status_of([&] { attention_forward(attention_for(Isa(isa), DType(dtype)), threads, *attention); });
}

EXPORT int gptoss_ft_attention_backward(int isa, int threads, int dtype, const Attention* attention) {
    return status_of([&] { attention_backward(attention_for(Isa(isa), DType(dtype)), threads, *attention); });
}

EXPORT int gptoss_ft_swiglu(int isa, int threads, int dtype, const SwiGLU* of, const void* gate_up, void* act) {
    return status_of([&] { swiglu(experts_for(isa, dtype, dtype), threads, *of, DType(dtype), gate_up, act); });
}

EXPORT int gptoss_ft_swiglu_backward(int isa, int threads, int dtype, const SwiGLU* of, const void* gate_up,
                                     const void* d_z, const float* weights, void* z, void* d_gate_up,
                                     float* d_weights) {
    return status_of([&] {
        swiglu_backward(experts_for(isa, dtype, dtype), threads, *of, DType(dtype), gate_up, d_z, weights, z, d_gate_up,
                        d_weights);
    });
}

EXPORT int gptoss_ft_combine(int isa, int threads, int dtype, const void* y, const int64_t* slots, const float* weights,
                             int64_t tokens, int64_t choices, int64_t columns, void* out) {
    return status_of([&] {
        combine(experts_for(isa, dtype, dtype), threads, DType(dtype), y, slots, weights, tokens, choices, columns, out);
    });
}

// Both projections are packed: [num_experts, 2 * intermediate, hidden] and [num_experts, hidden, intermediate].
EXPORT int gptoss_ft_mixture(int isa, int threads, int dtype, const void* hidden, const int64_t* experts,
                             const float* weights, int64_t tokens, int64_t choices, const uint8_t* gate_up,
                             const uint8_t* gate_up_scales, const void* gate_up_bias, const uint8_t* down,
                             const uint8_t* down_scales, const void* down_bias, int bias_dtype, int64_t num_experts,
                             int64_t hidden_size, int64_t intermediate_size, float alpha, float limit, void* out) {
    return status_of([&] {
        const Experts up{kMXFP4, gate_up, gate_up_scales, nullptr, num_experts, 2 * intermediate_size, hidden_size};
        const Experts back{kMXFP4, down, down_scales, nullptr, num_experts, hidden_size, intermediate_size};
        const Mixture of{up, back, gate_up_bias, down_bias, DType(bias_dtype), alpha, limit};
        mixture(kernels_for(Isa(isa), DType(dtype), kMXFP4), experts_for(isa, dtype, dtype), threads, of, DType(dtype),
                hidden, experts, weights, tokens, choices, out);
    });
}

// One after the other, each of what the one before made of the tokens, if its step says so.
EXPORT int gptoss_ft_decoder_layers(int isa, int threads, int dtype, int64_t count, const DecoderLayer* const* layers,
                                    const Step* steps) {
    return status_of([&] {
        for (int64_t i = 0; i < count; ++i) {
            const LayerKernels kernels{kernels_for(Isa(isa), DType(dtype), layers[i]->dense),
                                       kernels_for(Isa(isa), DType(dtype), kMXFP4), experts_for(isa, dtype, dtype),
                                       attention_for(Isa(isa), DType(dtype))};
            decoder_layer(isa, kernels, threads, *layers[i], DType(dtype), steps[i]);
        }
    });
}

EXPORT int gptoss_ft_low_rank_down(int isa, int threads, int dtype, const LowRankFactor* factor, const void* x,
                                   float* h) {
    return status_of([&] {
        low_rank_down(experts_for(isa, dtype, int(factor->dtype)), threads, DType(dtype), x, *factor, h);
    });
}

EXPORT int gptoss_ft_low_rank_up(int isa, int threads, int dtype, const LowRankFactor* factor, const float* h,
                                 float scale, void* y) {
    return status_of([&] {
        low_rank_up(experts_for(isa, dtype, int(factor->dtype)), threads, DType(dtype), h, *factor, scale, y);
    });
}

EXPORT int gptoss_ft_low_rank_gradient(int isa, int threads, int dtype, const LowRankFactor* factor, const float* h,
                                       const void* x, float scale) {
    return status_of([&] {
        low_rank_gradient(experts_for(isa, dtype, int(factor->dtype)), threads, DType(dtype), h, x, scale, *factor);
    });
}
