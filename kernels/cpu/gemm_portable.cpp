// For every processor: vectors of four floats, which are SSE2 on x86-64 and NEON on AArch64.
#include <cstring>

#include "kernels.h"

namespace gptoss_ft {
namespace {

#define TARGET
#define WIDTH 4
#define TILE_ROWS 6
#include "gemm_f32.h"

inline vec decode_codes(const uint8_t* codes) {
    return vec{kE2M1[codes[0]], kE2M1[codes[1]], kE2M1[codes[2]], kE2M1[codes[3]]};
}

}  // namespace

const Kernels& portable_kernels(DType dtype) {
    static const Kernels f32 = f32_kernels<float>(), bf16 = f32_kernels<uint16_t>();
    return dtype == kBFloat16 ? bf16 : f32;
}

}  // namespace gptoss_ft
