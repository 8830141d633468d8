// RMSNorm of a row for any vector width: the body of norm.cpp for by_isa.h.

#include "vectors.h"

// out = weight * x / sqrt(mean of x^2 + epsilon)
template <class X, class W>
TARGET void norm_row(const X* x, const W* weight, int64_t columns, float epsilon, X* out) {
    // Four sums keep additions from waiting for each other.
    vec squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * WIDTH <= columns; i += 4 * WIDTH)
        for (int part = 0; part < 4; ++part) {
            const vec some = load(x + i + part * WIDTH);
            squares[part] += some * some;
        }
    for (; i < columns; i += WIDTH) {
        const vec some = load_some(x + i, columns - i);
        squares[0] += some * some;
    }
    const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(columns);
    const float scale = 1.f / std::sqrt(mean + epsilon);
    for (i = 0; i < columns; i += WIDTH)
        store_some(out + i, load_some(weight + i, columns - i) * (load_some(x + i, columns - i) * scale), columns - i);
}
