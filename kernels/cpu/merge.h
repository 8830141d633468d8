// Merging low-rank updates into rows of frozen weights, for any vector width: the body of merge.cpp for by_isa.h.
//
// kernels/merging.py is the definition, to the last bit: merge.cpp is compiled without contraction to fused
// multiply-adds.

#include "vectors.h"

typedef uint8_t bytes __attribute__((vector_size(WIDTH)));

// A block is kept as its even elements, then its odd ones: they are the low and the high nibbles of its bytes.
constexpr int kParts = kBlockBytes / WIDTH;
constexpr int kTileRows = WIDTH / 4;  // of a tile in registers

TARGET static inline ints load_bytes(const uint8_t* from) {
    bytes value;
    std::memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, ints);
}

// The e2m1 number of each code.
TARGET static inline vec e2m1_value(ints code) {
    const ints magnitude = code & 7;
    // From 2 on, the code's bits are the lowest of the exponent and the highest of the mantissa.
    const vec large = (vec)((magnitude << 22) + (126 << 23));
    const vec small = __builtin_convertvector(magnitude, vec) * .5f;
    return (vec)((ints)select(magnitude < 2, small, large) | ((code & 8) << 28));
}

// The code of the nearest e2m1 number; ties go to even codes. Magnitudes lie on the lines 2a, a + 2 and a / 2 + 4.
TARGET static inline ints nearest_code(vec value) {
    constexpr float kMagic = 0x1.8p23f;  // adding and subtracting it rounds to whole numbers
    vec a = (vec)((ints)value & INT32_MAX);
    a = minimum(a, vec{} + 8.f);
    const vec first = (a * 2.f + kMagic) - kMagic;
    const vec second = ((a + kMagic) - kMagic) + 2.f;
    const vec third = ((a * .5f + kMagic) - kMagic) + 4.f;
    const vec code = minimum(minimum(first, minimum(second, third)), vec{} + 7.f);
    return __builtin_convertvector(code, ints) | (ints)((bits)value >> 31 << 3);
}

// The code of the e2m1 number at or below a magnitude, or of the one above it: `dither` shares of a step are added.
TARGET static inline ints dithered_code(vec value, vec dither) {
    vec a = (vec)((ints)value & INT32_MAX);
    a = minimum(a, vec{} + 8.f);
    const vec first = a * 2.f, second = a + 2.f, third = a * .5f + 4.f;
    const vec code = minimum(minimum(first, minimum(second, third)) + dither, vec{} + 7.f);
    return __builtin_convertvector(code, ints) | (ints)((bits)value >> 31 << 3);  // towards zero
}

TARGET static inline void store_codes(uint8_t* to, ints even, ints odd) {
    const bytes packed = __builtin_convertvector(even | odd << 4, bytes);
    std::memcpy(to, &packed, sizeof packed);
}

// Squared distance of a rounded block from what was wanted, summed in the order of the definition.
TARGET static inline double squared_error(const ints (&codes)[2 * kParts], float scale, const vec (&wanted)[2 * kParts]) {
    float error[2 * kBlockBytes];
    for (int i = 0; i < 2 * kParts; ++i) store(error + i * WIDTH, e2m1_value(codes[i]) * scale - wanted[i]);
    double sum[kBlockBytes];
    for (int i = 0; i < kBlockBytes; ++i) {
        const double even = error[i], odd = error[kBlockBytes + i];
        sum[i] = even * even + odd * odd;
    }
    for (int half = kBlockBytes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
}

// The exponent byte of the "even" rule for a block whose largest magnitude has these bits.
static inline int even_scale(uint32_t amax) {
    const int byte = static_cast<int>(amax >> 23) - 2 + ((amax & 0x7fffff) >= 0x600000);
    return byte < 0 ? 0 : byte;
}

TARGET static inline void round_codes(const vec (&wanted)[2 * kParts], int scale, ints (&codes)[2 * kParts]) {
    const vec unit = broadcast(e8m0_value(254 - scale));
    for (int i = 0; i < 2 * kParts; ++i) codes[i] = nearest_code(wanted[i] * unit);
}

TARGET static inline void dither_codes(const vec (&wanted)[2 * kParts], int scale, const uint8_t* base,
                                       ints (&codes)[2 * kParts]) {
    const vec unit = broadcast(e8m0_value(254 - scale));
    const uint32_t start = hash_of_block(base);
    for (int i = 0; i < 2 * kParts; ++i) {
        bits dither;
        std::memcpy(&dither, kDitherSteps.data() + i * WIDTH, sizeof dither);
        dither = (dither + start) >> 16;
        codes[i] = dithered_code(wanted[i] * unit, __builtin_convertvector((ints)dither, vec) * 0x1p-16f);
    }
}

// Round base + update of one block near the base.
template <bool DITHERED>
TARGET static inline void merge_block(const vec (&update)[2 * kParts], const uint8_t* base, int scale, uint8_t* blocks,
                                      uint8_t* out_scale) {
    ints base_codes[2 * kParts], codes[2 * kParts];
    vec wanted[2 * kParts];
    bits largest_bits{};
    const vec step = broadcast(e8m0_value(scale));
    for (int i = 0; i < kParts; ++i) {
        const ints packed = load_bytes(base + i * WIDTH);
        base_codes[i] = packed & 15;
        base_codes[kParts + i] = packed >> 4;
    }
    for (int i = 0; i < 2 * kParts; ++i) {
        wanted[i] = e2m1_value(base_codes[i]) * step + update[i];
        const bits magnitude = (bits)wanted[i] & INT32_MAX;
        largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
    }
    uint32_t amax = 0;
    for (int i = 0; i < WIDTH; ++i) amax = std::max<uint32_t>(amax, largest_bits[i]);
    if (amax >= 0x7f800000) {
        std::memmove(blocks, base, kBlockBytes);
        *out_scale = kE8M0NaN;
        return;
    }
    const int even = even_scale(amax);
    if (!DITHERED || even != scale) round_codes(wanted, scale, codes);
    if (even != scale) {
        ints rescaled[2 * kParts];
        round_codes(wanted, even, rescaled);
        if (squared_error(rescaled, e8m0_value(even), wanted) < squared_error(codes, e8m0_value(scale), wanted)) {
            std::memcpy(codes, rescaled, sizeof codes);
            scale = even;
        }
    }
    if (DITHERED) dither_codes(wanted, scale, base, codes);
    for (int i = 0; i < 2 * kParts; ++i) {
        const ints both_zero = ((codes[i] | base_codes[i]) & 7) == 0;
        codes[i] = (both_zero & base_codes[i]) | (~both_zero & codes[i]);
    }
    *out_scale = static_cast<uint8_t>(scale);
    for (int i = 0; i < kParts; ++i) store_codes(blocks + i * WIDTH, codes[i], codes[kParts + i]);
}

// `rows` rows of one column of blocks. A is its strip [rank, 32], even elements first; B is [rows, rank].
template <bool DITHERED, int ROWS>
TARGET static void merge_tile(const PackedMerge& m, const float* A, const float* B, int64_t first_block) {
    vec update[ROWS][2 * kParts];
    for (int64_t r = 0; r < m.rank; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < 2 * kParts; ++i) {
            const vec a = load(A + r * kBlock + i * WIDTH);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) {
                const vec product = a * broadcast(B[row * m.rank + r]);
                update[row][i] = r == 0 ? product : update[row][i] + product;
            }
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        const int64_t block = first_block + row * m.groups;
        merge_block<DITHERED>(update[row], m.base_blocks + block * kBlockBytes, m.base_scales[block],
                              m.blocks + block * kBlockBytes, m.scales + block);
    }
}

// Rows [first, first + rows) of one expert. `strips` has room for the expert's kStripBlocks columns of blocks of A and
// `factors` for B [rows, rank].
template <bool DITHERED>
TARGET static void merge_packed_rows(const PackedMerge& m, int64_t expert, int64_t first, int64_t rows, float* strips,
                                     float* factors) {
    const float* A = m.A + expert * m.rank * m.groups * kBlock;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t r = 0; r < m.rank; ++r)
            factors[row * m.rank + r] = m.B[(r * m.experts + expert) * m.rows + first + row];
    for (int64_t start = 0; start < m.groups; start += kStripBlocks) {
        const int64_t count = std::min(kStripBlocks, m.groups - start);
        for (int64_t g = 0; g < count; ++g)
            for (int64_t r = 0; r < m.rank; ++r)
                for (int64_t i = 0; i < kBlockBytes; ++i) {
                    const float* pair = A + (r * m.groups + start + g) * kBlock + 2 * i;
                    float* strip = strips + (g * m.rank + r) * kBlock + i;
                    strip[0] = pair[0], strip[kBlockBytes] = pair[1];
                }
        const int64_t row_block = (expert * m.rows + first) * m.groups + start;
        int64_t row = 0;
        for (; row + kTileRows <= rows; row += kTileRows)
            for (int64_t g = 0; g < count; ++g)
                merge_tile<DITHERED, kTileRows>(m, strips + g * m.rank * kBlock, factors + row * m.rank,
                                                row_block + row * m.groups + g);
        for (; row < rows; ++row)
            for (int64_t g = 0; g < count; ++g)
                merge_tile<DITHERED, 1>(m, strips + g * m.rank * kBlock, factors + row * m.rank,
                                        row_block + row * m.groups + g);
    }
}

// One row of a dense weight, rounded to bf16.
template <class T>
TARGET static void merge_dense_row(const DenseMerge& m, int64_t row) {
    const T* base = static_cast<const T*>(m.base) + row * m.columns;
    T* out = static_cast<T*>(m.out) + row * m.columns;
    for (int64_t column = 0; column < m.columns; column += WIDTH) {
        const int64_t count = m.columns - column;
        vec update{};
        for (int64_t r = 0; r < m.rank; ++r) {
            const vec product = load_some(m.A + r * m.columns + column, count) * broadcast(m.B[row * m.rank + r]);
            update = r == 0 ? product : update + product;
        }
        const vec target = load_some(base + column, count) + update;
        store_some(out + column, (vec)(rounded_to_bf16(target) << 16), count);
    }
}

TARGET static void merge_dense_rows(const DenseMerge& m, int64_t row) {
    m.dtype == kBFloat16 ? merge_dense_row<uint16_t>(m, row) : merge_dense_row<float>(m, row);
}
