// Rows of a sum, for any vector width: the body of sparse_product.cpp for by_isa.h.

#include "vectors.h"

TARGET static void add_rows(float* out, const float* factors, const float* rows, int64_t rows_stride, int64_t count,
                            int64_t length) {
    for (int64_t k = 0; k < count; ++k) {
        if (factors[k] == 0) continue;
        const float* row = rows + k * rows_stride;
        const vec factor = broadcast(factors[k]);
        int64_t j = 0;
        for (; j + WIDTH <= length; j += WIDTH) store(out + j, load(out + j) + factor * load(row + j));
        if (j < length)
            store_some(out + j, load_some(out + j, length - j) + factor * load_some(row + j, length - j), length - j);
    }
}
