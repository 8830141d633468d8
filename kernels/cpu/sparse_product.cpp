// out += sparse * rows, where most elements of `sparse` are zero but none is known beforehand to be.
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "parallel.h"
#include "targets.h"

namespace gptoss_ft {
namespace {

namespace portable {
#define TARGET
#define WIDTH 4
#include "sparse_product.h"
#undef TARGET
#undef WIDTH
}  // namespace portable

#ifdef GPTOSS_FT_X86
namespace avx2 {
#define TARGET AVX2_TARGET
#define WIDTH 8
#include "sparse_product.h"
#undef TARGET
#undef WIDTH
}  // namespace avx2

namespace avx512 {
#define TARGET AVX512_TARGET
#define WIDTH 16
#include "sparse_product.h"
#undef TARGET
#undef WIDTH
}  // namespace avx512
#endif

}  // namespace
}  // namespace gptoss_ft

// out [rows, length], sparse [rows, count], dense [count, length]; strides of rows in elements.
extern "C" __attribute__((visibility("default"))) int gptoss_ft_add_sparse_product(
    int isa, int threads, float* out, int64_t out_stride, const float* sparse, int64_t sparse_stride,
    const float* dense, int64_t dense_stride, int64_t rows, int64_t count, int64_t length) {
    using namespace gptoss_ft;
    auto add_rows = &portable::add_rows;
#ifdef GPTOSS_FT_X86
    if (isa == kAvx2) add_rows = &avx2::add_rows;
    if (isa == kAvx512Bf16) add_rows = &avx512::add_rows;
#endif
    for_each_item(threads, rows, 8, [&] {
        return [&](int64_t row) {
            add_rows(out + row * out_stride, sparse + row * sparse_stride, dense, dense_stride, count, length);
        };
    });
    return 0;
}
