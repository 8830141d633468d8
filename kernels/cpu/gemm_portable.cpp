// For every processor: vectors of four floats, which are SSE2 on x86-64 and NEON on AArch64.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace gptoss_ft {
namespace {

#define TARGET
#define WIDTH 4
#define TILE_ROWS 6
#include "gemm_f32.h"

vec load(const uint16_t* from) {
    vec_bf16 value;
    std::memcpy(&value, from, sizeof value);
    return (vec)(__builtin_convertvector(value, vec_bits) << 16);
}

template <class T>
void transpose_8_rows(const T* from, int64_t stride, int64_t rows, int64_t depth, float* out, int64_t step) {
    for (int64_t i = 0; i < rows; ++i) {
        const T* row = from + i * stride;
        int64_t k = 0;
        for (; k + WIDTH <= depth; k += WIDTH) {
            const vec values = load(row + k);
            for (int j = 0; j < WIDTH; ++j) out[(k + j) * step + i] = values[j];
        }
        T rest[WIDTH] = {};
        std::memcpy(rest, row + k, (depth - k) * sizeof(T));
        for (int j = 0; k + j < depth; ++j) out[(k + j) * step + i] = load(rest)[j];
    }
}

inline void decode_block(const uint8_t* bytes, vec out[kBlock / WIDTH]) {
    for (int i = 0; i < kBlock / WIDTH; ++i) {
        const int first = bytes[2 * i], second = bytes[2 * i + 1];
        out[i] = vec{kE2M1[first & 15], kE2M1[first >> 4], kE2M1[second & 15], kE2M1[second >> 4]};
    }
}

int quick_order(int i) { return i; }

inline void decode_quickly(const uint8_t* bytes, vec out[kBlock / WIDTH]) { decode_block(bytes, out); }

void decode_columns(const Weight& w, int64_t row, int64_t input, int64_t depth, float* panel) {
    const float* scales = scale_values();
    for (int n = 0; n < kColumns; ++n)
        for (int64_t k = 0; k < depth; k += kBlock) {
            vec values[kBlock / WIDTH];
            decode_block(w.at(row + n, input + k), values);
            const float scale = scales[*w.scale(row + n, (input + k) / kBlock)];
            for (int i = 0; i < kBlock; ++i) panel[(k + i) * kColumns + n] = values[i / WIDTH][i % WIDTH] * scale;
        }
}

}  // namespace

const Kernels& portable_kernels(DType activations, DType weights) { return kernels_for(activations, weights); }

}  // namespace gptoss_ft
