// bf16 products by VDPBF16PS over weights decoded in registers, or dense. Included by gemm_avx512.cpp, which defines
// TARGET.
//
// A panel holds 32 columns as [depth / 2][32][2] bf16: two vectors for each pair of depths. 32 weights become bf16 in
// three or four instructions: spread the 4-bit codes into 16-bit words (multishift, or permute and shift), look the
// word up in a table of values times 2^125 (vpermw reads five bits of the index, so the table repeats after 16 entries
// and the bit above a code may be anything), and subtract 125 + 127 - e from the exponent. The subtraction saturates,
// so zero stays zero without a mask. In L1, on Zen 4, this costs 3.7 cycles for 32 weights.
namespace bf16 {

constexpr int kColumns = 2 * WIDTH;
constexpr int kTileRows = TILE_ROWS;
constexpr int kTilePad = 16;
constexpr int kDxBlocks = 8;  // four blocks are one cache line of codes

// Scales outside are left to fp32. Above 252 values overflow; VDPBF16PS takes subnormal operands and products for zero,
// and from 32 on products with activations down to 2^-30 are normal. Trained checkpoints stay between 90 and 130.
constexpr int kScaleMin = 32, kScaleMax = 252;

struct alignas(64) Tables {
    uint16_t values[32];        // e2m1 times 2^125, without -0
    uint16_t scaled[256][32];   // e2m1 times each scale
    uint8_t spread[4][64];      // bit offsets: byte i of each of the two dwords of a quadword, as two words
    uint8_t pair[4][64];        // byte offsets: 16 columns of two rows, [block][half]
    uint16_t interleave[2][32];  // of two rows of 32 columns, the first and the last 16
    Tables() {
        for (int i = 0; i < 32; ++i) {
            const float value = kE2M1[i & 15];
            values[i] = value == 0 ? 0 : bf16_from_float(value * 0x1p125f);
            for (int e = 0; e < 256; ++e) scaled[e][i] = bf16_from_float(value * e8m0_value(e));
        }
        for (int byte = 0; byte < 4; ++byte)
            for (int i = 0; i < 64; ++i)
                spread[byte][i] = static_cast<uint8_t>((i % 8 / 4) * 32 + byte * 8 + (i % 4 / 2) * 4);
        for (int i = 0; i < 64; ++i) interleave[i / 32][i % 32] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
        for (int which = 0; which < 4; ++which)
            for (int word = 0; word < 32; ++word) {
                const int column = which % 2 * 16 + word / 2, row = word % 2;
                const int byte = row * 32 + which / 2 * 16 + column / 2;
                pair[which][2 * word] = pair[which][2 * word + 1] = static_cast<uint8_t>(byte);
            }
    }
};

static const Tables& tables() {
    static const Tables all;
    return all;
}

TARGET static inline __m128i load128(const uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// The same 16 bytes, of which `mask` selects those that may be read, from 16 rows: out[i] has bytes 4i to 4i + 3 of
// row r in its dword r.
TARGET static inline void load_16_rows(const uint8_t* from, int64_t stride, __mmask16 mask, __m512i out[4]) {
    __m512i quarter[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        const uint8_t* row = from + r * stride;
        __m512i rows = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(mask, row));
        rows = _mm512_inserti32x4(rows, _mm_maskz_loadu_epi8(mask, row + 4 * stride), 1);
        rows = _mm512_inserti32x4(rows, _mm_maskz_loadu_epi8(mask, row + 8 * stride), 2);
        quarter[r] = _mm512_inserti32x4(rows, _mm_maskz_loadu_epi8(mask, row + 12 * stride), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(quarter[0], quarter[1]), b = _mm512_unpacklo_epi32(quarter[2], quarter[3]);
    const __m512i c = _mm512_unpackhi_epi32(quarter[0], quarter[1]), d = _mm512_unpackhi_epi32(quarter[2], quarter[3]);
    out[0] = _mm512_unpacklo_epi64(a, b);
    out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d);
    out[3] = _mm512_unpackhi_epi64(c, d);
}

// At most 16 rows of bf16 as [padded depth / 2][16 rows] pairs, each 16 at a multiple of `step` bytes; zeros beyond.
TARGET static void pack_pairs(const uint8_t* from, int64_t stride, int64_t rows, int64_t depth, uint8_t* out,
                              int64_t step) {
    for (int64_t k = 0; k < depth; k += 8, out += 4 * step) {
        const int64_t bytes = 2 * std::min<int64_t>(depth - k, 8);
        __m512i pairs[4];
        if (rows == 16) {
            load_16_rows(from + 2 * k, 2 * stride, static_cast<__mmask16>((1u << bytes) - 1), pairs);
        } else {
            alignas(64) uint8_t padded[16][16] = {};
            for (int64_t i = 0; i < rows; ++i) std::memcpy(padded[i], from + 2 * (i * stride + k), bytes);
            load_16_rows(padded[0], 16, 0xffff, pairs);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + i * step, pairs[i]);
    }
}

// Activations as [depth / 2][16 rows] pairs: one cache line of broadcasts for each pair of depths, and one stream for
// the prefetcher where the rows themselves would be 14.
TARGET void pack_tile(const void* x, int64_t stride, int64_t rows, int64_t depth, void* tile) {
    pack_pairs(static_cast<const uint8_t*>(x), stride, rows, depth, static_cast<uint8_t*>(tile), kTilePad * 4);
}

TARGET bool pack_forward_dense(const Weight& w, int64_t row, int64_t input, int64_t depth, void* panel) {
    for (int64_t half = 0; half < kColumns; half += 16) {
        const int64_t rows = std::clamp<int64_t>(w.rows - row - half, 0, 16);
        pack_pairs(w.at(row + half, input), w.inputs, rows, depth, static_cast<uint8_t*>(panel) + half * 4,
                   kColumns * 4);
    }
    return true;
}

TARGET bool pack_dx_dense(const Weight& w, int64_t row, int64_t depth, int64_t input, int64_t width, void* panels) {
    const Tables& t = tables();
    const __m512i low = _mm512_load_si512(t.interleave[0]), high = _mm512_load_si512(t.interleave[1]);
    const int64_t stride = w.row_bytes();
    for (int64_t n = 0; n < padded_depth(depth); n += 2) {
        const uint8_t* from = w.at(row + n, input);
        prefetch(from + depth * stride, 2 * width + 1);
        prefetch(from + (depth + 1) * stride, 2 * width + 1);
        for (int64_t column = 0; column < width; column += kColumns) {
            const auto readable = static_cast<__mmask32>((1ull << std::min<int64_t>(width - column, 32)) - 1);
            const __m512i a = _mm512_maskz_loadu_epi16(n < depth ? readable : 0, from + 2 * column);
            const __m512i b = _mm512_maskz_loadu_epi16(n + 1 < depth ? readable : 0, from + 2 * column + stride);
            uint16_t* out = static_cast<uint16_t*>(panels) + column * panel_stride(depth) + n * kColumns;
            _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(out + 32, _mm512_permutex2var_epi16(a, high, b));
        }
    }
    return true;
}

// What to subtract from a table value's bits for the scale byte in each lane. A scale out of range sets `worst` above
// kScaleMax - kScaleMin: those too large wrap around.
TARGET static inline __m512i exponent_drop(__m512i scales, __m512i& worst) {
    const __m512i drop = _mm512_sub_epi32(_mm512_set1_epi32(kScaleMax), scales);
    worst = _mm512_max_epu32(worst, drop);
    return _mm512_slli_epi32(drop, 7);
}

TARGET bool pack_forward(const Weight& w, int64_t row, int64_t input, int64_t depth, void* panel) {
    const Tables& t = tables();
    const __m512i values = _mm512_load_si512(t.values);
    const __m512i spread[4] = {_mm512_load_si512(t.spread[0]), _mm512_load_si512(t.spread[1]),
                               _mm512_load_si512(t.spread[2]), _mm512_load_si512(t.spread[3])};
    const int64_t stride = w.row_bytes(), num_blocks = depth / kBlock, first = input / kBlock;
    static_assert(kDepth / kBlock <= 16, "one load has the scales of all blocks of a row");
    __m512i worst = _mm512_setzero_si512();
    for (int half = 0; half < 2; ++half) {
        const int64_t top = row + half * 16;
        __m512i scales[4];
        load_16_rows(w.scale(top, first), w.row_blocks(), static_cast<__mmask16>((1u << num_blocks) - 1), scales);
        alignas(64) uint32_t scale_words[4][16];
        for (int i = 0; i < 4; ++i) _mm512_store_si512(scale_words[i], scales[i]);
        for (int64_t b = 0; b < num_blocks; ++b) {
            __m512i codes[4];
            load_16_rows(w.at(top, input + b * kBlock), stride, 0xffff, codes);
            const __m128i bits = _mm_cvtsi32_si128(static_cast<int>(b % 4 * 8));
            const __m512i shifted = _mm512_srl_epi32(_mm512_load_si512(scale_words[b / 4]), bits);
            __m512i drop = exponent_drop(_mm512_and_si512(shifted, _mm512_set1_epi32(255)), worst);
            drop = _mm512_or_si512(drop, _mm512_slli_epi32(drop, 16));
            uint16_t* out = static_cast<uint16_t*>(panel) + b * kBlock * kColumns + half * 32;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const __m512i index = _mm512_multishift_epi64_epi8(spread[j], codes[i]);
                    const __m512i value = _mm512_subs_epu16(_mm512_permutexvar_epi16(index, values), drop);
                    _mm512_store_si512(out + (4 * i + j) * 2 * kColumns, value);
                }
        }
    }
    return _mm512_reduce_max_epu32(worst) <= kScaleMax - kScaleMin;
}

TARGET bool pack_dx(const Weight& w, int64_t row, int64_t depth, int64_t input, int64_t width, void* panels) {
    const Tables& t = tables();
    const __m512i values = _mm512_load_si512(t.values);
    const __m512i pair[4] = {_mm512_load_si512(t.pair[0]), _mm512_load_si512(t.pair[1]), _mm512_load_si512(t.pair[2]),
                             _mm512_load_si512(t.pair[3])};
    const __m512i odd_columns = _mm512_set1_epi64(0x0004000400000000);
    const int64_t stride = w.row_bytes(), num_blocks = width / kBlock;
    const auto scale_mask = static_cast<__mmask16>((1u << num_blocks) - 1);
    __m256i worst = _mm256_setzero_si256();
    for (int64_t n = 0; n < depth; n += 2) {
        const uint8_t* from = w.at(row + n, input);
        const uint8_t* scale = w.scale(row + n, input / kBlock);
        // Two cache lines of each of many rows: those of the next call, to arrive while these are multiplied.
        prefetch(from + depth * stride, 65);
        prefetch(from + (depth + 1) * stride, 65);
        prefetch(scale + depth * w.row_blocks(), 1);
        const __m128i both = _mm_unpacklo_epi8(_mm_maskz_loadu_epi8(scale_mask, scale),
                                               _mm_maskz_loadu_epi8(scale_mask, scale + w.row_blocks()));
        const __m256i drop = _mm256_sub_epi16(_mm256_set1_epi16(kScaleMax), _mm256_cvtepu8_epi16(both));
        worst = _mm256_max_epu16(worst, _mm256_maskz_mov_epi32(static_cast<__mmask8>(scale_mask), drop));
        alignas(32) uint32_t drops[kDxBlocks];
        _mm256_store_si256(reinterpret_cast<__m256i*>(drops), _mm256_slli_epi16(drop, 7));
        for (int64_t b = 0; b < num_blocks; b += 2) {
            const __mmask32 readable = b + 1 < num_blocks ? 0xffffffff : 0xffff;
            const __m256i upper = _mm256_maskz_loadu_epi8(readable, from + b * kBlockBytes);
            const __m256i lower = _mm256_maskz_loadu_epi8(readable, from + b * kBlockBytes + stride);
            const __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(upper), lower, 1);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                if (b + i / 2 == num_blocks) break;
                __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(pair[i], codes), odd_columns);
                const __m512i value = _mm512_subs_epu16(_mm512_permutexvar_epi16(index, values),
                                                        _mm512_set1_epi32(static_cast<int>(drops[b + i / 2])));
                uint16_t* panel = static_cast<uint16_t*>(panels) + (b + i / 2) * panel_stride(depth) * kColumns;
                _mm512_store_si512(panel + n * kColumns + i % 2 * 32, value);
            }
        }
    }
    alignas(32) uint16_t drops[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(drops), worst);
    return *std::max_element(drops, drops + 16) <= kScaleMax - kScaleMin;
}

// Few rows have few sums, and a sum waits for its predecessor: PARTS keep apart what belongs to every PARTS-th pair.
template <int ROWS, int PARTS>
TARGET static void multiply_rows(const uint8_t* tile, const uint16_t* panel, int64_t depth, float* c, bool accumulate) {
    __m512 sum[PARTS][ROWS][2];
#pragma GCC unroll 28
    for (int i = 0; i < ROWS * PARTS * 2; ++i) sum[i / 2 / ROWS][i / 2 % ROWS][i % 2] = _mm512_setzero_ps();
    for (int64_t k = 0; k < padded_depth(depth) / 2; k += PARTS)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) {
            const auto b0 = (__m512bh)_mm512_load_si512(panel + (k + part) * 2 * kColumns);
            const auto b1 = (__m512bh)_mm512_load_si512(panel + (k + part) * 2 * kColumns + 32);
            const uint8_t* a = tile + (k + part) * kTilePad * 4;
            _mm_prefetch(reinterpret_cast<const char*>(a + 1024), _MM_HINT_T0);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) {
                int pair;
                std::memcpy(&pair, a + 4 * i, 4);
                const auto both = (__m512bh)_mm512_set1_epi32(pair);
                sum[part][i][0] = _mm512_dpbf16_ps(sum[part][i][0], both, b0);
                sum[part][i][1] = _mm512_dpbf16_ps(sum[part][i][1], both, b1);
            }
        }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            __m512 total = sum[0][i][j];
#pragma GCC unroll 4
            for (int part = 1; part < PARTS; ++part) total = _mm512_add_ps(total, sum[part][i][j]);
            float* out = c + i * kColumns + j * WIDTH;
            _mm512_store_ps(out, accumulate ? _mm512_add_ps(_mm512_load_ps(out), total) : total);
        }
}

template <int ROWS = kTileRows>
TARGET void multiply(int64_t rows, const void* tile, const void* panel, int64_t depth, float* c, bool accumulate) {
    constexpr int parts = ROWS <= 3 ? 4 : ROWS <= 6 ? 2 : 1;
    if (rows == ROWS)
        multiply_rows<ROWS, parts>(static_cast<const uint8_t*>(tile), static_cast<const uint16_t*>(panel), depth, c,
                                   accumulate);
    else if constexpr (ROWS > 1)
        multiply<ROWS - 1>(rows, tile, panel, depth, c, accumulate);
}

TARGET void decode(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, void* out) {
    const Tables& t = tables();
    for (int64_t b = 0; b < num_blocks; ++b) {
        const __m512i bytes = _mm512_cvtepu8_epi32(load128(blocks + b * kBlockBytes));
        const __m512i index = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
        const __m512i weights = _mm512_permutexvar_epi16(index, _mm512_load_si512(t.scaled[scales[b]]));
        _mm512_storeu_si512(static_cast<uint16_t*>(out) + b * kBlock, weights);
    }
}

}  // namespace bf16
