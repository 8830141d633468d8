// RMSNorm of few rows on the calling thread: another one would wake up after it is done.
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"

namespace gptoss_ft {
namespace {

#define BODY "norm.h"
#include "by_isa.h"

template <class X, class W>
void all_rows(int isa, const void* x, const void* weight, int64_t rows, int64_t columns, float epsilon, void* out) {
    const auto kernel = OF_ISA(isa, norm_row<X, W>);
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
