// AVX2 and FMA: every activation type is computed in fp32.
#ifdef GPTOSS_FT_X86
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace gptoss_ft {
namespace {

#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define TILE_ROWS 6
#include "gemm_f32.h"

TARGET inline vec decode_codes(const uint8_t* codes) {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    // The permutation looks at three bits only, the magnitude; the fourth is the sign.
    const __m256 magnitude = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kE2M1), code);
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(8)), 28);
    return _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign));
}

}  // namespace

const Kernels& avx2_kernels(DType dtype) {
    static const Kernels f32 = f32_kernels<float>(), bf16 = f32_kernels<uint16_t>();
    return dtype == kBFloat16 ? bf16 : f32;
}

}  // namespace gptoss_ft
#endif
