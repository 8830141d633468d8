// Products of at most kFewRows bf16 rows by VDPBF16PS: what they wait for is the weights, so these are read once, in the
// order of their addresses, and nothing is transposed or stored. Included by gemm_avx512.cpp after gemm_bf16.h.
//
// Reading four weight rows side by side, which would share loads of activations, brought half as many bytes a second.
namespace bf16 {

constexpr int64_t kGroup = 4 * kBlock;  // weights whose codes fill a register
// Bytes between the codes that are multiplied and those brought into the L1 cache. Without this, one core read MXFP4 at
// 16 instead of 18 GB/s (Zen 4), and at 12 if they were brought into L2 only.
constexpr int64_t kAhead = 2048;
// The same of dense weights, which leave time to wait: a page, so that its address is known when it is reached.
constexpr int64_t kAheadDense = 4096;

typedef uint32_t Words __attribute__((vector_size(64)));

// Past the L2 cache, where weights that are read once would take the place of what the next operations work with.
TARGET static inline void fetch(const uint8_t* from) {
    _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_NTA);
}

// 2^(e - 127) of the first `count` of 16 scale bytes.
TARGET static inline __m512 floats_of_scales(const uint8_t* scales, int64_t count) {
    const auto readable = static_cast<__mmask16>((1u << std::min<int64_t>(count, 16)) - 1);
    const Words bits = (Words)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(readable, scales)) << 23;
    // 2^-127 is subnormal and byte 255 is NaN: both have this bit.
    return (__m512)(bits | (((Words)(bits == 0) | (Words)(bits == 0x7f800000)) & 0x00400000));
}

// Which weight of a group pack_few_mxfp4 puts at `i`: a shift brings one code of each word to where it is looked up.
// With this and scales made 16 at a time, one core read 17 GB/s, instead of 13.6 with a multishift of quadwords and the
// scales of each group by themselves.
constexpr int from_code(int i) { return i % 32 * 4 + i / 32; }

// Inputs in the order of the decoded weights, each row padded with zeros to whole groups.
TARGET void pack_few_mxfp4(const void* x, int64_t stride, int64_t rows, int64_t depth, void* packed) {
    const auto* from = static_cast<const uint16_t*>(x);
    auto* out = static_cast<uint16_t*>(packed);
    for (int64_t i = 0; i < rows; ++i, from += stride)
        for (int64_t k = 0; k < depth; k += kGroup, out += kGroup) {
            uint16_t group[kGroup] = {};
            std::memcpy(group, from + k, std::min(kGroup, depth - k) * sizeof(uint16_t));
            for (int j = 0; j < kGroup; ++j) out[j] = group[from_code(j)];
        }
}

// total[i] += four blocks of weights * row i of x. Block b is in lanes 4b to 4b + 3, and so is its scale.
template <int ROWS>
TARGET static inline void add_group(__m512i codes, __m512 scale, const uint16_t* x, int64_t stride, __m512i values,
                                    __m512 (&total)[ROWS]) {
    __m512 sum[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
        const auto weights = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * part), values);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            const auto inputs = (__m512bh)_mm512_loadu_si512(x + i * stride + part * kBlock);
            sum[i] = _mm512_dpbf16_ps(sum[i], weights, inputs);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) total[i] = total[i] + sum[i] * scale;
}

template <int ROWS>
TARGET static void few_mxfp4(const uint16_t* x, const Weight& w, int64_t row, float* c) {
    const __m512i values = _mm512_load_si512(tables().scaled[127]);
    const __m512i block = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const int64_t blocks = w.row_blocks(), stride = ceil_div(w.inputs, kGroup) * kGroup;
    for (int n = 0; n < kColumns; ++n) {
        const uint8_t *codes = w.at(row + n, 0), *scales = w.scale(row + n, 0);
        for (int64_t b = 0; b < blocks; b += 64) fetch(scales + kAhead / kBlockBytes + b);
        __m512 total[ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) total[i] = _mm512_setzero_ps();
        for (int64_t first = 0; first < blocks; first += 16) {
            const __m512 scale = floats_of_scales(scales + first, blocks - first);
#pragma GCC unroll 4
            for (int group = 0; group < 4; ++group) {
                const int64_t b = first + 4 * group, left = blocks - b;
                if (left <= 0) break;
                const __m512 own = _mm512_permutexvar_ps(block + _mm512_set1_epi32(4 * group), scale);
                fetch(codes + b * kBlockBytes + kAhead);
                const int64_t words = std::min<int64_t>(left, 4) * (kBlockBytes / 2);
                const auto readable = static_cast<__mmask32>((1ull << words) - 1);
                const __m512i some = left >= 4 ? _mm512_loadu_si512(codes + b * kBlockBytes)
                                               : _mm512_maskz_loadu_epi16(readable, codes + b * kBlockBytes);
                add_group(some, own, x + b * kBlock, stride, values, total);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) c[i * kColumns + n] = _mm512_reduce_add_ps(total[i]);
    }
}

template <int ROWS>
TARGET static void few_dense(const uint16_t* x, int64_t stride, const Weight& w, int64_t row, float* c) {
    constexpr int parts = ROWS == 1 ? 4 : 2;  // sums that do not wait for each other
    for (int64_t n = 0; n < std::min<int64_t>(kColumns, w.rows - row); ++n) {
        const uint8_t* weights = w.at(row + n, 0);
        __m512 sum[parts][ROWS];
#pragma GCC unroll 16
        for (int i = 0; i < parts * ROWS; ++i) sum[i / ROWS][i % ROWS] = _mm512_setzero_ps();
        int64_t k = 0;
        for (; k + 32 * parts <= w.inputs; k += 32 * parts)
#pragma GCC unroll 4
            for (int part = 0; part < parts; ++part) {
                fetch(weights + 2 * k + part * 64 + kAheadDense);
                const auto some = (__m512bh)_mm512_loadu_si512(weights + 2 * k + part * 64);
#pragma GCC unroll 4
                for (int i = 0; i < ROWS; ++i)
                    sum[part][i] = _mm512_dpbf16_ps(
                        sum[part][i], some, (__m512bh)_mm512_loadu_si512(x + i * stride + k + part * 32));
            }
        for (; k < w.inputs; k += 32) {
            const auto readable = static_cast<__mmask32>((1ull << std::min<int64_t>(w.inputs - k, 32)) - 1);
            const auto some = (__m512bh)_mm512_maskz_loadu_epi16(readable, weights + 2 * k);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i)
                sum[0][i] = _mm512_dpbf16_ps(sum[0][i], some,
                                             (__m512bh)_mm512_maskz_loadu_epi16(readable, x + i * stride + k));
        }
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            __m512 total = sum[0][i];
#pragma GCC unroll 4
            for (int part = 1; part < parts; ++part) total = _mm512_add_ps(total, sum[part][i]);
            c[i * kColumns + n] = _mm512_reduce_add_ps(total);
        }
    }
}

TARGET void forward_few(const void* x, int64_t, int64_t rows, const Weight& w, int64_t row, float* c) {
    constexpr decltype(&few_mxfp4<1>) of_rows[] = {few_mxfp4<1>, few_mxfp4<2>, few_mxfp4<3>, few_mxfp4<4>};
    static_assert(std::size(of_rows) == kFewRows);
    of_rows[rows - 1](static_cast<const uint16_t*>(x), w, row, c);
}

TARGET void forward_few_dense(const void* x, int64_t stride, int64_t rows, const Weight& w, int64_t row, float* c) {
    constexpr decltype(&few_dense<1>) of_rows[] = {few_dense<1>, few_dense<2>, few_dense<3>, few_dense<4>};
    static_assert(std::size(of_rows) == kFewRows);
    of_rows[rows - 1](static_cast<const uint16_t*>(x), stride, w, row, c);
}

inline Kernels packed_kernels(const Kernels& exact) {
    return {kColumns,    kTileRows,    kTilePad * sizeof(uint16_t), kColumns * sizeof(uint16_t),
            pack_tile,   pack_forward, pack_dx,                     multiply<>,
            exact.store, forward_few,  pack_few_mxfp4,              &exact,
            decode};
}

inline Kernels dense_kernels(const Kernels& float32) {
    return {kColumns,      kTileRows,          kTilePad * sizeof(uint16_t), kColumns * sizeof(uint16_t),
            pack_tile,     pack_forward_dense, pack_dx_dense,               multiply<>,
            float32.store, forward_few_dense,  nullptr,                     nullptr,
            decode};
}

}  // namespace bf16
