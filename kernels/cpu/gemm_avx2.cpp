// AVX2 and FMA: every activation type is computed in fp32.
#ifdef GPTOSS_FT_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace gptoss_ft {
namespace {

#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define TILE_ROWS 6
#include "gemm_f32.h"
#include "pack_avx2.h"

}  // namespace

const Kernels& avx2_kernels(DType activations, DType weights) { return kernels_for(activations, weights); }

}  // namespace gptoss_ft
#endif
