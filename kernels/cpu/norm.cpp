// RMSNorm of few rows on the calling thread: another one would wake up after it is done.
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "norm_rows.h"

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

void rms_norm(int isa, DType dtype, const void* x, DType weight_dtype, const void* weight, int64_t rows,
              int64_t columns, float epsilon, void* out) {
    const bool x16 = dtype == kBFloat16, w16 = weight_dtype == kBFloat16;
    const auto of = x16 ? w16 ? &all_rows<uint16_t, uint16_t> : &all_rows<uint16_t, float>
                        : w16 ? &all_rows<float, uint16_t> : &all_rows<float, float>;
    of(isa, x, weight, rows, columns, epsilon, out);
}

}  // namespace gptoss_ft

extern "C" __attribute__((visibility("default"))) int gptoss_ft_rms_norm(int isa, int, int dtype, const void* x,
                                                                         int weight_dtype, const void* weight,
                                                                         int64_t rows, int64_t columns, float epsilon,
                                                                         void* out) {
    using namespace gptoss_ft;
    rms_norm(isa, DType(dtype), x, DType(weight_dtype), weight, rows, columns, epsilon, out);
    return 0;
}
