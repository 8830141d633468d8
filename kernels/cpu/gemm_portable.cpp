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

template <class T>
void transpose_8_rows(const T* from, int64_t stride, int64_t rows, int64_t depth, float* out, int64_t step) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < depth; ++k) out[k * step + i] = load_element(from + i * stride + k);
}

void decode_block(const uint8_t* bytes, float scale, float* out, int64_t panel_step) {
    for (int k = 0; k < kBlock; k += kColumns, out += panel_step)
        for (int i = 0; i < kColumns; i += 2) {
            const int pair = bytes[(k + i) / 2];
            out[i] = kE2M1[pair & 15] * scale;
            out[i + 1] = kE2M1[pair >> 4] * scale;
        }
}

void decode_columns(const Weight& w, int64_t row, int64_t input, int64_t depth, float* panel) {
    for (int n = 0; n < kColumns; ++n)
        for (int64_t k = 0; k < depth; k += kBlock) {
            float block[kBlock];
            decode_block(w.at(row + n, input + k), e8m0_value(*w.scale(row + n, (input + k) / kBlock)), block, kColumns);
            for (int i = 0; i < kBlock; ++i) panel[(k + i) * kColumns + n] = block[i];
        }
}

}  // namespace

const Kernels& portable_kernels(DType activations, DType weights) { return kernels_for(activations, weights); }

}  // namespace gptoss_ft
