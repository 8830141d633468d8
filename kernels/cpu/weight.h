// Weights as the kernels read them: packed or dense, row-major, at any address of a mapped file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mxfp4.h"

namespace gptoss_ft {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kMXFP4 = 2 };  // the last of weights only

// Bytes of `count` elements; for MXFP4, of their codes.
inline int64_t bytes_of(DType dtype, int64_t count) {
    return dtype == kMXFP4 ? count / 2 : dtype == kBFloat16 ? 2 * count : 4 * count;
}

// One expert's projection.
struct Weight {
    DType type;
    const uint8_t* data;    // [rows, inputs]
    const uint8_t* scales;  // MXFP4 only: e8m0 [rows, inputs / 32]
    int64_t rows, inputs;

    int64_t row_bytes() const { return bytes_of(type, inputs); }
    int64_t row_blocks() const { return inputs / kBlock; }
    const uint8_t* at(int64_t row, int64_t input) const { return data + row * row_bytes() + bytes_of(type, input); }
    const uint8_t* scale(int64_t row, int64_t block) const { return scales + row * row_blocks() + block; }
};

// Elements [first, first + count) of fp32 or bf16 `from`.
inline void load_floats(const void* from, DType dtype, int64_t first, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i)
        out[i] = dtype == kBFloat16 ? float_from_bf16(static_cast<const uint16_t*>(from)[first + i])
                                    : static_cast<const float*>(from)[first + i];
}

// Ask for `bytes` bytes to be brought into the L2 cache. Addresses beyond the mapping do no harm. The asm says that
// this has an effect: GCC drops calls of functions that do nothing but prefetch.
inline void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    asm volatile("");
}

}  // namespace gptoss_ft
