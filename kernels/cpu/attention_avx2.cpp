// AVX2 and FMA: both types of activations are computed in fp32.
#ifdef GPTOSS_FT_X86
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include "attention.h"
#include "targets.h"

namespace gptoss_ft {
namespace {

#define TARGET AVX2_TARGET
#define WIDTH 8
#define TILE_ROWS 6
#define WORD_VALUES 1
#include "attention_impl.h"

}  // namespace

const AttentionKernels& avx2_attention(DType dtype) {
    static const AttentionKernels float32 = kernels<float>(), bfloat16 = kernels<uint16_t>();
    return dtype == kBFloat16 ? bfloat16 : float32;
}

}  // namespace gptoss_ft
#endif
