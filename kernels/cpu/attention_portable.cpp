// For every processor: vectors of four floats, which are SSE2 on x86-64 and NEON on AArch64.
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include "attention.h"

namespace gptoss_ft {
namespace {

#define TARGET
#define WIDTH 4
#define TILE_ROWS 6
#define WORD_VALUES 1
#include "attention_impl.h"

}  // namespace

const AttentionKernels& portable_attention(DType dtype) {
    static const AttentionKernels float32 = kernels<float>(), bfloat16 = kernels<uint16_t>();
    return dtype == kBFloat16 ? bfloat16 : float32;
}

}  // namespace gptoss_ft
