// AVX-512: fp32 activations by FMA, bf16 activations by VDPBF16PS, which adds two products to every fp32 lane.
#ifdef GPTOSS_FT_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "kernels.h"
#include "targets.h"

namespace gptoss_ft {
namespace {

#define TARGET AVX512_TARGET
#define WIDTH 16
#define TILE_ROWS 14

namespace f32 {
#include "gemm_f32.h"

TARGET inline vec load(const uint16_t* from) {
    const __m512i values = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return (vec)_mm512_slli_epi32(values, 16);
}

#include "pack_avx2.h"
}  // namespace f32

#include "gemm_bf16.h"

#include "gemv_bf16.h"

}  // namespace

const Kernels& avx512_kernels(DType activations, DType weights) {
    const Kernels& float32 = f32::kernels_for(activations, weights);
    // fp32 weights would lose bits in bf16 products.
    if (activations == kFloat32 || weights == kFloat32) return float32;
    static const Kernels packed = bf16::packed_kernels(f32::kernels_for(kBFloat16, kMXFP4));
    static const Kernels dense = bf16::dense_kernels(f32::kernels_for(kBFloat16, kBFloat16));
    return weights == kMXFP4 ? packed : dense;
}

}  // namespace gptoss_ft
#endif
