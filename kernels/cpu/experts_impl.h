// The kernels of experts.h for any vector width. Included by each experts_*.cpp, inside a namespace of its own, after it
// has defined
//   TARGET   the function attribute that enables its instructions
//   WIDTH    fp32 lanes of a vector
#include "vectors.h"

#include "experts_activation.h"

#include "experts_low_rank.h"

template <class X, class F>
constexpr ExpertKernels kernels() {
    return {swiglu_row<X>, swiglu_row_backward<X>, combine_row<X>, down<X, F>, up<X, F>, gradient<X, F>};
}

template <class X>
const ExpertKernels& kernels_for(DType factors) {
    static const ExpertKernels float32 = kernels<X, float>(), bfloat16 = kernels<X, uint16_t>();
    return factors == kBFloat16 ? bfloat16 : float32;
}

static const ExpertKernels& kernels_for(DType activations, DType factors) {
    return activations == kBFloat16 ? kernels_for<uint16_t>(factors) : kernels_for<float>(factors);
}
