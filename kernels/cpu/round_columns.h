// One sweep over the columns of a weight, for any vector width: the body of round_columns.cpp for by_isa.h. Lanes
// are rows, so nothing waits for a column but the next column.

#include "vectors.h"

constexpr int64_t kSweepRows = WIDTH;

// The number nearest to `value` among those of e2m1, with ties to even multiples of the spacing.
TARGET static inline vec nearest_e2m1(vec value) {
    const ints sign = (ints)value & INT32_MIN;
    vec magnitude = (vec)((ints)value & INT32_MAX);
    magnitude = select(magnitude < 6.f, magnitude, vec{} + 6.f);
    const vec spacing = select(magnitude < 2.f, vec{} + .5f, select(magnitude < 4.f, vec{} + 1.f, vec{} + 2.f));
    const vec magic = spacing * 0x1.8p23f;  // adding and subtracting it rounds to a multiple of the spacing
    return (vec)((ints)((magnitude + magic) - magic) | sign);
}

TARGET static void sweep_rows(const Sweep& s, int64_t first, int64_t rows) {
    alignas(64) vec wanted[kMaxColumns], residual;
    for (int64_t k = 0; k < s.columns; ++k) {
        wanted[k] = vec{};
        for (int64_t i = 0; i < rows; ++i) wanted[k][i] = s.wanted[(first + i) * s.wanted_stride + k];
    }
    for (int64_t k = 0; k < s.columns; ++k) {
        vec step = vec{} + 1.f, old = vec{};
        for (int64_t i = 0; i < rows; ++i) {
            step[i] = s.steps[(first + i) * s.steps_stride + k];
            if (s.old) old[i] = s.old[(first + i) * s.old_stride + k];
        }
        const vec rounded = nearest_e2m1(wanted[k] / step) * step;
        residual = s.old ? rounded - old : wanted[k] - rounded;
        const float* spread = s.spread + k * s.spread_stride;
        for (int64_t j = k + 1; j < s.columns; ++j) wanted[j] -= residual * spread[j];
        for (int64_t i = 0; i < rows; ++i) {
            s.wanted[(first + i) * s.wanted_stride + k] = rounded[i];
            s.residuals[(first + i) * s.columns + k] = residual[i];
        }
    }
}
