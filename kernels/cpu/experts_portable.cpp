// For every processor: vectors of four floats, which are SSE2 on x86-64 and NEON on AArch64.
#include <cstring>
#include <utility>

#include "experts.h"

namespace gptoss_ft {
namespace {

#define TARGET
#define WIDTH 4
#include "experts_impl.h"

}  // namespace

const ExpertKernels& portable_experts(DType activations, DType factors) { return kernels_for(activations, factors); }

}  // namespace gptoss_ft
