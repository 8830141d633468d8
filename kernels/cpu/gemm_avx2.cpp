// AVX2 and FMA: every activation type is computed in fp32.
#ifdef GPTOSS_FT_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "targets.h"

namespace gptoss_ft {
namespace {

#define TARGET AVX2_TARGET
#define WIDTH 8
#define TILE_ROWS 6
#include "gemm_f32.h"

TARGET inline vec load(const uint16_t* from) {
    const __m256i values = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return (vec)_mm256_slli_epi32(values, 16);
}

#include "pack_avx2.h"

}  // namespace

const Kernels& avx2_kernels(DType activations, DType weights) { return kernels_for(activations, weights); }

}  // namespace gptoss_ft
#endif
