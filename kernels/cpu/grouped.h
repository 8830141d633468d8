// Grouped products of activations with expert weights, packed or dense.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gptoss_ft {

// Rows [ends[e - 1], ends[e]) of the activations belong to expert e.
struct Experts {
    DType type;
    const uint8_t* data;    // [num_experts, out, in]; for MXFP4 [num_experts, out, in / 32, 16]
    const uint8_t* scales;  // MXFP4 only: [num_experts, out, in / 32]
    const int64_t* ends;    // [num_experts]
    int64_t num_experts;
    int64_t out;            // for MXFP4 both multiples of 32, otherwise any size from 1
    int64_t in;

    Weight weight(int64_t expert) const {
        const int64_t size = out * in;
        return {type, data + bytes_of(type, expert * size), scales ? scales + expert * size / kBlock : nullptr, out, in};
    }
};

// y[t] = x[t] W[e(t)]^T + bias[e(t)]; bias [num_experts, out] of type `bias_dtype`, or null.
void grouped_linear(const Kernels&, int threads, const Experts&, DType, const void* x, const void* bias,
                    DType bias_dtype, void* y);

// dx[t] = dy[t] W[e(t)].
void grouped_linear_dx(const Kernels&, int threads, const Experts&, DType, const void* dy, void* dx);

}  // namespace gptoss_ft
