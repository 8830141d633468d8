// The three products of LoRA, on one expert's rows or strip of columns. Part of experts_impl.h.
//
// LoRA is a few per cent of the block's arithmetic, so these stay simple: fp32 vectors, no packing of what is used once.

constexpr int kDotRows = 3, kDotRanks = 4;   // 12 sums and 5 operands fill 16 registers
constexpr int kTileRows = 6, kTileVecs = 2;  // likewise
constexpr int64_t kPanelRows = 64;           // of x: a panel is 16 KB, which stays in the L1 cache

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

// Rows of `count` <= kStrip columns as fp32, zero up to kStrip.
template <class T>
TARGET static inline void pack_panel(const T* from, int64_t stride, int64_t rows, int64_t count, float* panel) {
    for (int64_t k = 0; k < rows; ++k)
        for (int64_t c = 0; c < kStrip; c += WIDTH)
            store(panel + k * kStrip + c, c < count ? load_some(from + k * stride + c, count - c) : vec{});
}

// sums[i, kStrip] (+)= sum over k < depth of a[i * row_step + k * depth_step] * panel[k], for at most kTileRows rows. A
// short tile repeats its first row, and stores it once.
TARGET static inline void multiply_tile(const float* a, int64_t row_step, int64_t depth_step, int64_t rows,
                                        const float* panel, int64_t depth, float* sums, bool accumulate) {
    static_assert(kTileVecs == 2 && kStrip % (kTileVecs * WIDTH) == 0);
    int64_t offset[kTileRows];
    for (int i = 0; i < kTileRows; ++i) offset[i] = (i < rows ? i : 0) * row_step;
    for (int64_t c = 0; c < kStrip; c += kTileVecs * WIDTH) {
        vec total[kTileRows][kTileVecs] = {};
        for (int64_t k = 0; k < depth; ++k) {
            const vec b0 = load(panel + k * kStrip + c), b1 = load(panel + k * kStrip + c + WIDTH);
#pragma GCC unroll 6
            for (int i = 0; i < kTileRows; ++i) {
                const vec value = broadcast(a[offset[i] + k * depth_step]);
                total[i][0] += value * b0;
                total[i][1] += value * b1;
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < kTileRows; ++i) {
            if (i >= rows) break;
#pragma GCC unroll 2
            for (int j = 0; j < kTileVecs; ++j) {
                float* to = sums + i * kStrip + c + j * WIDTH;
                store(to, accumulate ? load(to) + total[i][j] : total[i][j]);
            }
        }
    }
}

template <class X, class F>
TARGET void up(const float* h, int64_t rows, float scale, const void* factor, int64_t rank_stride, int64_t ranks,
               int64_t count, void* y, int64_t stride, float* panel) {
    pack_panel(static_cast<const F*>(factor), rank_stride, ranks, count, panel);
    alignas(64) float sums[kTileRows * kStrip];
    for (int64_t first = 0; first < rows; first += kTileRows) {
        // A short piece of each of many rows: those of the next tile, to arrive while this one is multiplied.
        for (int64_t next = first + kTileRows; next < rows && next < first + 2 * kTileRows; ++next)
            prefetch(reinterpret_cast<const uint8_t*>(static_cast<const X*>(y) + next * stride), count * sizeof(X));
        multiply_tile(h + first * ranks, ranks, 1, rows - first, panel, ranks, sums, false);
        for (int64_t i = 0; i < kTileRows && first + i < rows; ++i) {
            X* row = static_cast<X*>(y) + (first + i) * stride;
            int64_t c = 0;
            for (; c + WIDTH <= count; c += WIDTH) store(row + c, load(row + c) + scale * load(sums + i * kStrip + c));
            if (c < count)
                store_some(row + c, load_some(row + c, count - c) + scale * load(sums + i * kStrip + c), count - c);
        }
    }
}

template <class X, class F>
TARGET void gradient(const float* h, int64_t rows, float scale, const void* x, int64_t stride, int64_t ranks,
                     int64_t count, void* factor, int64_t rank_stride, float* sums) {
    for (int64_t i = 0; i < ranks * kStrip; ++i) sums[i] = 0;
    alignas(64) float panel[kPanelRows * kStrip];
    for (int64_t first = 0; first < rows; first += kPanelRows) {
        const int64_t depth = rows - first < kPanelRows ? rows - first : kPanelRows;
        pack_panel(static_cast<const X*>(x) + first * stride, stride, depth, count, panel);
        for (int64_t r = 0; r < ranks; r += kTileRows)
            multiply_tile(h + first * ranks + r, 1, ranks, ranks - r, panel, depth, sums + r * kStrip, true);
    }
    for (int64_t r = 0; r < ranks; ++r)
        for (int64_t c = 0; c < count; c += WIDTH)
            store_some(static_cast<F*>(factor) + r * rank_stride + c, scale * load(sums + r * kStrip + c), count - c);
}
