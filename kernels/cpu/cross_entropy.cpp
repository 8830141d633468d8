// Cross entropy and its gradient over rows of logits, in place: 201,088 numbers a row, read from cache after the first
// time and never copied.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "parallel.h"

namespace gptoss_ft {
namespace {

#define BODY "cross_entropy.h"
#include "by_isa.h"

template <class T>
void all_rows(int isa, int threads, T* logits, const int64_t* targets, const float* weights, int64_t rows,
              int64_t vocabulary, double* losses) {
    const auto kernel = OF_ISA(isa, row_in_place<T>);
    for_each_item(threads, rows, 1, [&] {
        return [&](int64_t row) {
            losses[row] = kernel(logits + row * vocabulary, vocabulary, targets[row], weights[row]);
        };
    });
}

}  // namespace
}  // namespace gptoss_ft

// `logits` [rows, vocabulary] become their gradient; `targets` in [0, vocabulary), `weights` and `losses` [rows].
extern "C" __attribute__((visibility("default"))) int gptoss_ft_cross_entropy(int isa, int threads, int dtype,
                                                                              void* logits, const int64_t* targets,
                                                                              const float* weights, int64_t rows,
                                                                              int64_t vocabulary, double* losses) {
    using namespace gptoss_ft;
    if (dtype == kBFloat16)
        all_rows(isa, threads, static_cast<uint16_t*>(logits), targets, weights, rows, vocabulary, losses);
    else
        all_rows(isa, threads, static_cast<float*>(logits), targets, weights, rows, vocabulary, losses);
    return 0;
}
