// Cross entropy and its gradient over rows of logits, in place: 201,088 numbers a row, read from cache after the first
// time and never copied.
#include <algorithm>
#include <cmath>
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
#include "cross_entropy.h"
#undef TARGET
#undef WIDTH
}  // namespace portable

#ifdef GPTOSS_FT_X86
namespace avx2 {
#define TARGET AVX2_TARGET
#define WIDTH 8
#include "cross_entropy.h"
#undef TARGET
#undef WIDTH
}  // namespace avx2

namespace avx512 {
#define TARGET AVX512_TARGET
#define WIDTH 16
#include "cross_entropy.h"
#undef TARGET
#undef WIDTH
}  // namespace avx512
#endif

template <class T>
auto row_kernel(int isa) {
#ifdef GPTOSS_FT_X86
    if (isa == kAvx512Bf16) return &avx512::row_in_place<T>;
    if (isa == kAvx2) return &avx2::row_in_place<T>;
#endif
    (void)isa;
    return &portable::row_in_place<T>;
}

template <class T>
void all_rows(int isa, int threads, T* logits, const int64_t* targets, const float* weights, int64_t rows,
              int64_t vocabulary, double* losses) {
    const auto kernel = row_kernel<T>(isa);
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
