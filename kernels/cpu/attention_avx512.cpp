// AVX-512: fp32 activations by FMA, bf16 activations by VDPBF16PS.
#ifdef GPTOSS_FT_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include "attention.h"
#include "targets.h"

namespace gptoss_ft {
namespace {

#define TARGET AVX512_TARGET
#define WIDTH 16
#define TILE_ROWS 14

namespace f32 {
#define WORD_VALUES 1
#include "attention_impl.h"
#undef WORD_VALUES
}  // namespace f32

namespace bf16 {
#define WORD_VALUES 2
#include "attention_impl.h"

TARGET inline vec add_product(vec sum, vec a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
}  // namespace bf16

}  // namespace

const AttentionKernels& avx512_attention(DType dtype) {
    static const AttentionKernels float32 = f32::kernels<float>(), bfloat16 = bf16::kernels<uint16_t>();
    return dtype == kBFloat16 ? bfloat16 : float32;
}

}  // namespace gptoss_ft
#endif
