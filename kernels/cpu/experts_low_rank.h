// The three products of LoRA, on one expert's rows or strip of columns. Part of experts_impl.h.
//
// LoRA is a few per cent of the block's arithmetic, so these stay simple: fp32 vectors, no packing of what is used once.

constexpr int kDotRows = 3, kDotRanks = 4;   // 12 sums and 5 operands fill 16 registers
constexpr int kTileRows = WIDTH == 16 ? 8 : 6, kTileVecs = 2;  // likewise; AVX-512 has 32 registers
constexpr int64_t kTileColumns = kTileVecs * WIDTH;
static_assert(kStrip % kTileColumns == 0);

// Vectors of elements of which products are summed, so that any order will do if both sides have it: bf16 pairs are
// split into even and odd elements, in half of the instructions of widening them in order.
template <class X, class F>
constexpr int kDotVecs = sizeof(X) == 2 && sizeof(F) == 2 ? 2 : 1;

template <int VECS, class T>
TARGET static inline void load_unordered(const T* from, vec (&to)[VECS]) {
    if constexpr (VECS == 2)
        load_pairs(from, WIDTH, to[0], to[1]);
    else
        to[0] = load(from);
}

template <int VECS, class T>
TARGET static inline void load_unordered_some(const T* from, int64_t count, vec (&to)[VECS]) {
    T all[VECS * WIDTH] = {};
    std::memcpy(all, from, count * sizeof(T));
    load_unordered(all, to);
}

// VECS * WIDTH columns, or the first `count` if not WHOLE: asking at every load made the loop half as fast.
template <bool WHOLE, int VECS, class X, class F>
TARGET static inline void add_dots(const X* const* row, const F* const* rank, int64_t column, int64_t count,
                                   vec (&total)[kDotRows][kDotRanks]) {
    vec f[kDotRanks][VECS], value[VECS];
#pragma GCC unroll 4
    for (int r = 0; r < kDotRanks; ++r)
        if constexpr (WHOLE)
            load_unordered(rank[r] + column, f[r]);
        else
            load_unordered_some(rank[r] + column, count, f[r]);
#pragma GCC unroll 3
    for (int i = 0; i < kDotRows; ++i) {
        if constexpr (WHOLE)
            load_unordered(row[i] + column, value);
        else
            load_unordered_some(row[i] + column, count, value);
#pragma GCC unroll 4
        for (int r = 0; r < kDotRanks; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < VECS; ++v) total[i][r] += value[v] * f[r][v];
    }
}

// h[i, r] for kDotRows rows and kDotRanks ranks. A short tile repeats a row or rank, and stores it once.
template <class X, class F>
TARGET static inline void dot_tile(const X* x, int64_t rows, const F* factor, int64_t rank_stride, int64_t ranks,
                                   int64_t columns, float* h, int64_t h_stride) {
    const X* row[kDotRows];
    const F* rank[kDotRanks];
#pragma GCC unroll 3
    for (int i = 0; i < kDotRows; ++i) row[i] = x + (i < rows ? i : 0) * columns;
#pragma GCC unroll 4
    for (int r = 0; r < kDotRanks; ++r) rank[r] = factor + (r < ranks ? r : 0) * rank_stride;
    vec total[kDotRows][kDotRanks] = {};
    constexpr int vecs = kDotVecs<X, F>, step = vecs * WIDTH;
    int64_t c = 0;
    for (; c + step <= columns; c += step) add_dots<true, vecs>(row, rank, c, step, total);
    if (c < columns) add_dots<false, vecs>(row, rank, c, columns - c, total);
#pragma GCC unroll 3
    for (int i = 0; i < kDotRows; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < kDotRanks; ++r)
            if (i < rows && r < ranks) h[i * h_stride + r] = sum(total[i][r]);
}

template <class X, class F>
TARGET void down(const void* x, int64_t rows, const void* factor, int64_t rank_stride, int64_t ranks, int64_t columns,
                 float* h) {
    for (int64_t r = 0; r < ranks; r += kDotRanks)
        for (int64_t i = 0; i < rows; i += kDotRows)
            dot_tile(static_cast<const X*>(x) + i * columns, rows - i, static_cast<const F*>(factor) + r * rank_stride,
                     rank_stride, ranks - r, columns, h + i * ranks + r, ranks);
}

// sums[i] = sum over k < depth of a[i * row_step + k * depth_step] * b[k * stride], for at most kTileRows rows and
// kTileColumns columns, or the first `count` if not WHOLE; a short tile repeats its first row. Then calls
// `put(i, column, sums, count)` for every row and vector of columns, of which `count` are meant.
template <bool WHOLE, class T, class Put>
TARGET static inline void multiply_tile(const float* a, int64_t row_step, int64_t depth_step, int64_t rows, const T* b,
                                        int64_t stride, int64_t depth, int64_t count, const Put& put) {
    const float* row[kTileRows];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) row[i] = a + (i < rows ? i : 0) * row_step;
    vec sums[kTileRows][kTileVecs] = {};
    for (int64_t k = 0; k < depth; ++k, b += stride) {
        vec value[kTileVecs];
#pragma GCC unroll 2
        for (int j = 0; j < kTileVecs; ++j)
            if constexpr (WHOLE)
                value[j] = load(b + j * WIDTH);
            else
                value[j] = j * WIDTH < count ? load_some(b + j * WIDTH, count - j * WIDTH) : vec{};
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i) {
            const vec factor = broadcast(row[i][k * depth_step]);
#pragma GCC unroll 2
            for (int j = 0; j < kTileVecs; ++j) sums[i][j] += factor * value[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kTileVecs; ++j)
            if (i < rows && (WHOLE || j * WIDTH < count))
                put(i, j * WIDTH, sums[i][j], WHOLE ? WIDTH : count - j * WIDTH);
}

template <class T, class Put>
TARGET static inline void multiply_tile(const float* a, int64_t row_step, int64_t depth_step, int64_t rows, const T* b,
                                        int64_t stride, int64_t depth, int64_t count, const Put& put) {
    if (count >= kTileColumns)
        multiply_tile<true>(a, row_step, depth_step, rows, b, stride, depth, count, put);
    else
        multiply_tile<false>(a, row_step, depth_step, rows, b, stride, depth, count, put);
}

template <class X, class F>
TARGET void up(const float* h, int64_t rows, float scale, const void* factor, int64_t rank_stride, int64_t ranks,
               int64_t count, void* y, int64_t stride) {
    for (int64_t first = 0; first < rows; first += kTileRows) {
        // A short piece of each of many rows: those of the next tile, to arrive while this one is multiplied.
        for (int64_t next = first + kTileRows; next < rows && next < first + 2 * kTileRows; ++next)
            prefetch(reinterpret_cast<const uint8_t*>(static_cast<const X*>(y) + next * stride), count * sizeof(X));
        for (int64_t c = 0; c < count; c += kTileColumns) {
            X* corner = static_cast<X*>(y) + first * stride + c;
            multiply_tile(h + first * ranks, ranks, 1, rows - first, static_cast<const F*>(factor) + c, rank_stride,
                          ranks, count - c, [=](int64_t i, int64_t column, vec sums, int64_t left) TARGET {
                              X* to = corner + i * stride + column;
                              store_some(to, load_some(to, left) + scale * sums, left);
                          });
        }
    }
}

template <class X, class F>
TARGET void gradient(const float* h, int64_t rows, float scale, const void* x, int64_t stride, int64_t ranks,
                     int64_t count, void* factor, int64_t rank_stride) {
    for (int64_t c = 0; c < count; c += kTileColumns) {
        const X* from = static_cast<const X*>(x) + c;
        // As in `up`: the next columns, of all rows.
        if (c + kTileColumns < count)
            for (int64_t i = 0; i < rows; ++i)
                prefetch(reinterpret_cast<const uint8_t*>(from + i * stride + kTileColumns), kTileColumns * sizeof(X));
        for (int64_t r = 0; r < ranks; r += kTileRows) {
            F* corner = static_cast<F*>(factor) + r * rank_stride + c;
            multiply_tile(h + r, 1, ranks, ranks - r, from, stride, rows, count - c,
                          [=](int64_t i, int64_t column, vec sums, int64_t left) TARGET {
                              store_some(corner + i * rank_stride + column, scale * sums, left);
                          });
        }
    }
}
