// Sweeps over the columns of a weight, for any vector width: the body of round_columns.cpp for by_isa.h.

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

// Lanes are rows, so nothing waits for a column but the next column.
TARGET static void sweep_rows(const Sweep& s, int64_t first, int64_t rows) {
    alignas(64) vec wanted[kMaxColumns];
    for (int64_t k = 0; k < s.columns; ++k) {
        wanted[k] = vec{};
        for (int64_t i = 0; i < rows; ++i) wanted[k][i] = s.wanted[(first + i) * s.wanted_stride + k];
    }
    for (int64_t k = 0; k < s.columns; ++k) {
        vec step = vec{} + 1.f, target = vec{};
        for (int64_t i = 0; i < rows; ++i) {
            step[i] = s.steps[(first + i) * s.steps_stride + k];
            target[i] = s.target[(first + i) * s.target_stride + k];
        }
        const vec rounded = nearest_e2m1(wanted[k] / step) * step;
        const vec error = rounded - target;
        const float* spread = s.spread + k * s.spread_stride;
        for (int64_t j = k + 1; j < s.columns; ++j) wanted[j] -= error * spread[j];
        for (int64_t i = 0; i < rows; ++i) {
            s.wanted[(first + i) * s.wanted_stride + k] = rounded[i];
            s.errors[(first + i) * s.columns + k] = error[i];
        }
    }
}

// What changed in some columns of a row.
struct Changes {
    int64_t count;
    const float* moment[kDescentColumns];  // the row of each changed column
    float by[kDescentColumns];
};

// Each of `count` columns of a row, from `start` on, becomes the best number while all others stay. Lanes are columns,
// most of which stay as they are.
TARGET static void settle(const Descent& d, int64_t row, int64_t start, int64_t count, const float* inverse_diagonal,
                          Changes& changes) {
    float* rounded = d.rounded + row * d.rounded_stride + start;
    const float* steps = d.steps + row * d.steps_stride + start;
    float gradient[kDescentColumns], found[WIDTH];
    std::memcpy(gradient, d.gradient + row * d.gradient_stride + start, count * sizeof(float));
    changes.count = 0;
    for (int64_t i = 0; i < count; i += WIDTH) {
        const int64_t width = std::min<int64_t>(WIDTH, count - i);
        for (int64_t lane = 0; lane < width; ++lane) {
            const vec old = load_some(rounded + i, width), step = load_some(steps + i, width);
            const vec wanted = old - load_some(gradient + i, width) * load_some(inverse_diagonal + i, width);
            store(found, nearest_e2m1(wanted / step) * step);
            while (lane < width && found[lane] == rounded[i + lane]) ++lane;
            if (lane == width) break;
            const int64_t k = i + lane;
            const float* moment = d.moment + (start + k) * d.moment_stride;
            const float by = found[lane] - rounded[k];
            rounded[k] = found[lane];
            changes.moment[changes.count] = moment;
            changes.by[changes.count++] = by;
            for (int64_t j = i; j < count; j += WIDTH) {
                const int64_t some = std::min<int64_t>(WIDTH, count - j);
                const vec moved = load_some(gradient + j, some) + broadcast(by) * load_some(moment + start + j, some);
                store_some(gradient + j, moved, some);
            }
        }
    }
}

TARGET static void add_changes(const Changes& changes, float* gradient, int64_t columns) {
    for (int64_t j = 0; j < columns; j += WIDTH) {
        const int64_t width = std::min<int64_t>(WIDTH, columns - j);
        vec sum = load_some(gradient + j, width);
        for (int64_t c = 0; c < changes.count; ++c)
            sum += broadcast(changes.by[c]) * load_some(changes.moment[c] + j, width);
        store_some(gradient + j, sum, width);
    }
}

// Lower the cost of rows by changing one element at a time, over all columns again and again, until none changes.
TARGET static void descend_rows(const Descent& d, int64_t first, int64_t rows) {
    bool is_changing[kDescentRows], has_changed[kDescentRows];
    std::fill(is_changing, is_changing + rows, true);
    Changes changes;
    for (int64_t pass = 0; pass < d.max_passes; ++pass) {
        std::fill(has_changed, has_changed + rows, false);
        for (int64_t start = 0; start < d.columns; start += kDescentColumns) {
            const int64_t count = std::min(kDescentColumns, d.columns - start);
            float inverse_diagonal[kDescentColumns];
            for (int64_t k = 0; k < count; ++k)
                inverse_diagonal[k] = 1 / d.moment[(start + k) * d.moment_stride + start + k];
            for (int64_t i = 0; i < rows; ++i) {
                if (!is_changing[i]) continue;
                settle(d, first + i, start, count, inverse_diagonal, changes);
                if (changes.count == 0) continue;
                has_changed[i] = true;
                add_changes(changes, d.gradient + (first + i) * d.gradient_stride, d.columns);
            }
        }
        if (std::none_of(has_changed, has_changed + rows, [](bool changed) { return changed; })) break;
        std::copy(has_changed, has_changed + rows, is_changing);
    }
}
