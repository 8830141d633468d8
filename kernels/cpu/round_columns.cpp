// Rounding to e2m1 column after column, each one's error taken into account by the others: the inner loops of GPTQ and of
// coordinate descent.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "parallel.h"

namespace gptoss_ft {
namespace {

constexpr int64_t kMaxColumns = 128;
// What 64 columns of 2,880 do to the gradients is 0.7 MB, which stays in the L2 cache while all rows use it.
constexpr int64_t kDescentColumns = 64, kDescentRows = 128;

struct Sweep {
    float* wanted;        // [rows, columns], becomes what was rounded
    int64_t wanted_stride;
    const float* target;  // error = rounded - target
    int64_t target_stride;
    const float* steps;
    int64_t steps_stride;
    const float* spread;  // [columns, columns]: what an error takes from later columns
    int64_t spread_stride;
    float* errors;        // [rows, columns], contiguous
    int64_t columns;
};

struct Descent {
    float* rounded;
    int64_t rounded_stride;
    float* gradient;
    int64_t gradient_stride;
    const float* steps;
    int64_t steps_stride;
    const float* moment;  // [columns, columns]
    int64_t moment_stride;
    int64_t columns;
    int64_t max_passes;
};

#define BODY "round_columns.h"
#include "by_isa.h"

}  // namespace
}  // namespace gptoss_ft

// Strides in elements; at most 128 columns.
extern "C" __attribute__((visibility("default"))) int gptoss_ft_round_columns(
    int isa, int threads, float* wanted, int64_t wanted_stride, const float* target, int64_t target_stride,
    const float* steps, int64_t steps_stride, const float* spread, int64_t spread_stride, float* errors, int64_t rows,
    int64_t columns) {
    using namespace gptoss_ft;
    const auto sweep = OF_ISA(isa, sweep_rows);
    const int64_t lanes = OF_ISA(isa, kSweepRows);
    const Sweep all{wanted, wanted_stride, target,        target_stride, steps,
                    steps_stride, spread,  spread_stride, errors,        columns};
    for_each_item(threads, ceil_div(rows, lanes), 4, [&] {
        return [&](int64_t item) { sweep(all, item * lanes, std::min(lanes, rows - item * lanes)); };
    });
    return 0;
}

// Strides in elements.
extern "C" __attribute__((visibility("default"))) int gptoss_ft_descend(
    int isa, int threads, float* rounded, int64_t rounded_stride, float* gradient, int64_t gradient_stride,
    const float* steps, int64_t steps_stride, const float* moment, int64_t moment_stride, int64_t rows,
    int64_t columns, int64_t max_passes) {
    using namespace gptoss_ft;
    const auto descend = OF_ISA(isa, descend_rows);
    const Descent all{rounded,      rounded_stride, gradient,      gradient_stride, steps,
                      steps_stride, moment,         moment_stride, columns,         max_passes};
    const int64_t group = std::min(kDescentRows, ceil_div(rows, int64_t{threads}));
    for_each_item(threads, group ? ceil_div(rows, group) : 0, 1, [&] {
        return [&](int64_t item) { descend(all, item * group, std::min(group, rows - item * group)); };
    });
    return 0;
}
