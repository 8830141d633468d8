// RMSNorm of few rows, on the calling thread.
#pragma once

#include <cstdint>

#include "weight.h"

namespace gptoss_ft {

// `x` and `out` [rows, columns] of type `dtype`, `weight` [columns] of its own.
void rms_norm(int isa, DType dtype, const void* x, DType weight_dtype, const void* weight, int64_t rows,
              int64_t columns, float epsilon, void* out);

}  // namespace gptoss_ft
