// RMSNorm of few rows on the calling thread: another one would wake up after it is done.
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "targets.h"

namespace gptoss_ft {
namespace {

namespace portable {
#define TARGET
#define WIDTH 4
#include "norm.h"
#undef TARGET
#undef WIDTH
}  // namespace portable

#ifdef GPTOSS_FT_X86
namespace avx2 {
#define TARGET AVX2_TARGET
#define WIDTH 8
#include "norm.h"
#undef TARGET
#undef WIDTH
}  // namespace avx2

namespace avx512 {
#define TARGET AVX512_TARGET
#define WIDTH 16
#include "norm.h"
#undef TARGET
#undef WIDTH
}  // namespace avx512
#endif

template <class X, class W>
auto row_kernel(int isa) {
#ifdef GPTOSS_FT_X86
    if (isa == kAvx512Bf16) return &avx512::norm_row<X, W>;
    if (isa == kAvx2) return &avx2::norm_row<X, W>;
#endif
    (void)isa;
    return &portable::norm_row<X, W>;
}

template <class X, class W>
void all_rows(int isa, const void* x, const void* weight, int64_t rows, int64_t columns, float epsilon, void* out) {
    const auto kernel = row_kernel<X, W>(isa);
    for (int64_t row = 0; row < rows; ++row)
        kernel(static_cast<const X*>(x) + row * columns, static_cast<const W*>(weight), columns, epsilon,
               static_cast<X*>(out) + row * columns);
}

}  // namespace
}  // namespace gptoss_ft

// `x` and `out` [rows, columns] of type `dtype`, `weight` [columns] of its own.
extern "C" __attribute__((visibility("default"))) int gptoss_ft_rms_norm(int isa, int, int dtype, const void* x,
                                                                         int weight_dtype, const void* weight,
                                                                         int64_t rows, int64_t columns, float epsilon,
                                                                         void* out) {
    using namespace gptoss_ft;
    const auto of = dtype == kBFloat16 ? weight_dtype == kBFloat16 ? &all_rows<uint16_t, uint16_t> : &all_rows<uint16_t, float>
                                       : weight_dtype == kBFloat16 ? &all_rows<float, uint16_t> : &all_rows<float, float>;
    of(isa, x, weight, rows, columns, epsilon, out);
    return 0;
}
