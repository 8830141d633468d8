// AVX-512: LoRA is too small a part of the block for products of bf16 pairs to matter.
#ifdef GPTOSS_FT_X86
#include <cstring>
#include <utility>

#include "experts.h"
#include "targets.h"

namespace gptoss_ft {
namespace {

#define TARGET AVX512_TARGET
#define WIDTH 16
#include "experts_impl.h"

}  // namespace

const ExpertKernels& avx512_experts(DType activations, DType factors) { return kernels_for(activations, factors); }

}  // namespace gptoss_ft
#endif
