// AVX2 and FMA.
#ifdef GPTOSS_FT_X86
#include <cstring>
#include <utility>

#include "experts.h"
#include "targets.h"

namespace gptoss_ft {
namespace {

#define TARGET AVX2_TARGET
#define WIDTH 8
#include "experts_impl.h"

}  // namespace

const ExpertKernels& avx2_experts(DType activations, DType factors) { return kernels_for(activations, factors); }

}  // namespace gptoss_ft
#endif
