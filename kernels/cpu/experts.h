// What surrounds the frozen products in gpt-oss's expert block: activation, weighted sum over experts, and LoRA.
//
// Activations are fp32 or bf16, LoRA factors too, independently; everything is computed in fp32. How sums are cut depends
// on shapes alone, so results do not change with the number of threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gptoss_ft {

// The clamped SwiGLU of interleaved gate (even) and up (odd) columns.
struct SwiGLU {
    int64_t rows, columns;  // of the result
    float alpha, limit;
};

// One LoRA factor of all experts, [num_experts, ranks, columns] with contiguous columns: A as it is, B transposed.
// Rows [ends[e - 1], ends[e]) of the activations belong to expert e.
struct LowRankFactor {
    void* data;
    int64_t dtype;
    int64_t expert_stride, rank_stride;  // elements
    const int64_t* ends;                 // [num_experts]
    const uint8_t* adapted;              // [num_experts], 0 for experts without this update; null: all have it
    int64_t num_experts, ranks, columns;
};

// Columns of one piece of work of `up` and `gradient`.
constexpr int64_t kStrip = 192;

// One instruction set and pair of types, on one thread. Strides in elements.
struct ExpertKernels {
    void (*swiglu)(const SwiGLU&, const void* gate_up, void* act);

    // Of z = weight * swiglu(gate_up), one row: z and the gradient of gate_up; returns that of the weight.
    float (*swiglu_backward)(const SwiGLU&, const void* gate_up, const void* d_z, float weight, void* z, void* d_gate_up);

    // out = sum over k of weights[k] * y[slots[k]]; null weights are ones.
    void (*combine)(const void* y, const int64_t* slots, const float* weights, int64_t choices, int64_t columns, void* out);

    // h[rows, ranks] = x[rows, columns] F^T, F [ranks, columns].
    void (*down)(const void* x, int64_t rows, const void* factor, int64_t rank_stride, int64_t ranks, int64_t columns,
                 float* h);

    // y[rows, count] += scale * h F, `count` columns of both.
    void (*up)(const float* h, int64_t rows, float scale, const void* factor, int64_t rank_stride, int64_t ranks,
               int64_t count, void* y, int64_t stride);

    // F[ranks, count] = scale * h^T x, `count` columns of both.
    void (*gradient)(const float* h, int64_t rows, float scale, const void* x, int64_t stride, int64_t ranks,
                     int64_t count, void* factor, int64_t rank_stride);
};

const ExpertKernels& portable_experts(DType activations, DType factors);
#ifdef GPTOSS_FT_X86
const ExpertKernels& avx2_experts(DType activations, DType factors);
const ExpertKernels& avx512_experts(DType activations, DType factors);
#endif

void swiglu(const ExpertKernels&, int threads, const SwiGLU&, DType, const void* gate_up, void* act);

// Of z = weights[row] * swiglu(gate_up): z and the gradients of gate_up and weights.
void swiglu_backward(const ExpertKernels&, int threads, const SwiGLU&, DType, const void* gate_up, const void* d_z,
                     const float* weights, void* z, void* d_gate_up, float* d_weights);

// out[t] = sum over k of weights[t, k] * y[slots[t, k]]; null weights are ones.
void combine(const ExpertKernels&, int threads, DType, const void* y, const int64_t* slots, const float* weights,
             int64_t tokens, int64_t choices, int64_t columns, void* out);

// h[n] = x[n] F[e(n)]^T, zero for experts that are not adapted.
void low_rank_down(const ExpertKernels&, int threads, DType, const void* x, const LowRankFactor&, float* h);

// y[n] += scale * h[n] F[e(n)] for experts that are adapted.
void low_rank_up(const ExpertKernels&, int threads, DType, const float* h, const LowRankFactor&, float scale, void* y);

// F[e] = scale * h[rows of e]^T x[rows of e], zero for experts that have no rows or are not adapted.
void low_rank_gradient(const ExpertKernels&, int threads, DType, const float* h, const void* x, float scale,
                       const LowRankFactor&);

}  // namespace gptoss_ft
