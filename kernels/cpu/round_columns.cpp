// Rounding to e2m1 column after column, each one's residual taken into account by the columns after it: the inner loop
// of GPTQ and of coordinate descent, which differ in what the residual is.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "parallel.h"

namespace gptoss_ft {
namespace {

constexpr int64_t kMaxColumns = 128;

struct Sweep {
    float* wanted;         // [rows, columns], becomes what was rounded
    int64_t wanted_stride;
    const float* old;      // residual = rounded - old; or null, and residual = wanted - rounded
    int64_t old_stride;
    const float* steps;
    int64_t steps_stride;
    const float* spread;   // [columns, columns]: what a residual takes from later columns
    int64_t spread_stride;
    float* residuals;      // [rows, columns], contiguous
    int64_t columns;
};

#define BODY "round_columns.h"
#include "by_isa.h"

}  // namespace
}  // namespace gptoss_ft

// Strides in elements; at most 128 columns.
extern "C" __attribute__((visibility("default"))) int gptoss_ft_round_columns(
    int isa, int threads, float* wanted, int64_t wanted_stride, const float* old, int64_t old_stride,
    const float* steps, int64_t steps_stride, const float* spread, int64_t spread_stride, float* residuals,
    int64_t rows, int64_t columns) {
    using namespace gptoss_ft;
    const auto sweep = OF_ISA(isa, sweep_rows);
    const int64_t lanes = OF_ISA(isa, kSweepRows);
    const Sweep all{wanted, wanted_stride, old,       old_stride, steps, steps_stride,
                    spread, spread_stride, residuals, columns};
    for_each_item(threads, ceil_div(rows, lanes), 4, [&] {
        return [&](int64_t item) { sweep(all, item * lanes, std::min(lanes, rows - item * lanes)); };
    });
    return 0;
}
