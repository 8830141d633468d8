// AVX-512: fp32 activations by FMA, bf16 activations by VDPBF16PS, which adds two products to every fp32 lane.
#ifdef GPTOSS_FT_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "kernels.h"

namespace gptoss_ft {
namespace {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma")))
#define WIDTH 16
#define TILE_ROWS 14

namespace f32 {
#include "gemm_f32.h"

TARGET inline vec decode_codes(const uint8_t* codes) {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_permutexvar_ps(code, _mm512_loadu_ps(kE2M1));
}
}  // namespace f32

#include "gemm_bf16.h"

}  // namespace

const Kernels& avx512_kernels(DType dtype) {
    static const Kernels float32 = f32::f32_kernels<float>(), exact = f32::f32_kernels<uint16_t>();
    static const Kernels bfloat16 = bf16::kernels(exact);
    return dtype == kBFloat16 ? bfloat16 : float32;
}

}  // namespace gptoss_ft
#endif
