// out += sparse * rows, where most elements of `sparse` are zero but none is known beforehand to be.
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "parallel.h"

namespace gptoss_ft {
namespace {

#define BODY "sparse_product.h"
#include "by_isa.h"

}  // namespace
}  // namespace gptoss_ft

// out [rows, length], sparse [rows, count], dense [count, length]; strides of rows in elements.
extern "C" __attribute__((visibility("default"))) int gptoss_ft_add_sparse_product(
    int isa, int threads, float* out, int64_t out_stride, const float* sparse, int64_t sparse_stride,
    const float* dense, int64_t dense_stride, int64_t rows, int64_t count, int64_t length) {
    using namespace gptoss_ft;
    const auto add_rows = OF_ISA(isa, add_rows);
    for_each_item(threads, rows, 8, [&] {
        return [&](int64_t row) {
            add_rows(out + row * out_stride, sparse + row * sparse_stride, dense, dense_stride, count, length);
        };
    });
    return 0;
}
