// Weights and activations into fp32 panels and tiles with AVX2. Included by gemm_avx2.cpp and, for fp32 products,
// gemm_avx512.cpp, after gemm_f32.h.
//
// Rows 0 to 3 of every eight lie in the lower halves of registers and rows 4 to 7 in the upper ones: unpacking works in
// halves, so that eight rows leave it in order, and the last unpacking, with zero, makes floats out of bf16.

TARGET static inline __m256i load_halves(const void* low, const void* high) {
    const __m256i lower = _mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low)));
    return _mm256_inserti128_si256(lower, _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
}

TARGET static inline void store_floats(float* to, __m256i bits) {
    _mm256_storeu_ps(to, _mm256_castsi256_ps(bits));
}

// Eight inputs of eight rows.
TARGET static inline void transpose_8x8(const uint16_t* const rows[8], int64_t k, float* out, int64_t step) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i both[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) both[i] = load_halves(rows[i] + k, rows[i + 4] + k);
    const __m256i a = _mm256_unpacklo_epi16(both[0], both[1]), b = _mm256_unpackhi_epi16(both[0], both[1]);
    const __m256i c = _mm256_unpacklo_epi16(both[2], both[3]), d = _mm256_unpackhi_epi16(both[2], both[3]);
    const __m256i pairs[4] = {_mm256_unpacklo_epi32(a, c), _mm256_unpackhi_epi32(a, c), _mm256_unpacklo_epi32(b, d),
                              _mm256_unpackhi_epi32(b, d)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        store_floats(out + 2 * i * step, _mm256_unpacklo_epi16(zero, pairs[i]));
        store_floats(out + (2 * i + 1) * step, _mm256_unpackhi_epi16(zero, pairs[i]));
    }
}

TARGET static inline void transpose_8x8(const float* const rows[8], int64_t k, float* out, int64_t step) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, k += 4, out += 4 * step) {
        __m256i both[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) both[i] = load_halves(rows[i] + k, rows[i + 4] + k);
        const __m256i a = _mm256_unpacklo_epi32(both[0], both[1]), b = _mm256_unpackhi_epi32(both[0], both[1]);
        const __m256i c = _mm256_unpacklo_epi32(both[2], both[3]), d = _mm256_unpackhi_epi32(both[2], both[3]);
        store_floats(out, _mm256_unpacklo_epi64(a, c));
        store_floats(out + step, _mm256_unpackhi_epi64(a, c));
        store_floats(out + 2 * step, _mm256_unpacklo_epi64(b, d));
        store_floats(out + 3 * step, _mm256_unpackhi_epi64(b, d));
    }
}

template <class T>
TARGET void transpose_8_rows(const T* from, int64_t stride, int64_t rows, int64_t depth, float* out, int64_t step) {
    const T* row[8];
    for (int64_t i = 0; i < 8; ++i) row[i] = from + std::min(i, rows - 1) * stride;
    // Where there are fewer than eight slots, the next ones are overwritten with what belongs there; the last have no
    // next ones.
    const int64_t direct = step < 8 ? depth - 8 : depth;
    int64_t k = 0;
    for (; k + 8 <= direct; k += 8) transpose_8x8(row, k, out + k * step, step);
    for (; k < depth; k += 8) {
        T rest[8][8] = {};
        float slots[8][8];
        const T* row_rest[8];
        for (int i = 0; i < 8; ++i) {
            std::memcpy(rest[i], row[i] + k, std::min<int64_t>(depth - k, 8) * sizeof(T));
            row_rest[i] = rest[i];
        }
        transpose_8x8(row_rest, 0, slots[0], 8);
        const size_t slot_bytes = std::min<int64_t>(step, 8) * sizeof(float);
        for (int i = 0; i < 8; ++i) std::memcpy(out + (k + i) * step, slots[i], slot_bytes);
    }
}

// The bytes of e2m1 values as bf16.
struct alignas(32) E2M1Bytes {
    uint8_t low[32], high[32];
    E2M1Bytes() {
        for (int i = 0; i < 32; ++i) {
            const uint16_t bits = bf16_from_float(kE2M1[i & 15]);
            low[i] = static_cast<uint8_t>(bits);
            high[i] = static_cast<uint8_t>(bits >> 8);
        }
    }
};

static const E2M1Bytes kE2M1Bytes;

// 32 codes, one in each byte, as bf16: [0] the lower eight of both halves, [1] the upper eight.
TARGET static inline void look_up(__m256i codes, __m256i out[2]) {
    const __m256i low = _mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)kE2M1Bytes.low), codes);
    const __m256i high = _mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)kE2M1Bytes.high), codes);
    out[0] = _mm256_unpacklo_epi8(low, high);
    out[1] = _mm256_unpackhi_epi8(low, high);
}

// bf16 to floats, of each half the lower or upper four.
TARGET static inline __m256 lower_floats(__m256i values) {
    return _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), values));
}
TARGET static inline __m256 upper_floats(__m256i values) {
    return _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), values));
}

#if WIDTH == 8
TARGET static inline vec join(const __m256* eights) { return (vec)eights[0]; }
#else
TARGET static inline vec join(const __m256* eights) {
    return (vec)_mm512_insertf32x8(_mm512_castps256_ps512(eights[0]), eights[1], 1);
}
#endif

// One block of 16 rows, the scales of rows 0-7 and 8-15 given; out[k * kColumns + row].
TARGET static inline void decode_16_rows(const uint8_t* from, int64_t stride, __m256 scale0, __m256 scale1,
                                         float* out) {
    __m256i both[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const uint8_t* row = from + (i / 4 * 8 + i % 4) * stride;
        both[i] = load_halves(row, row + 4 * stride);
    }
    __m256i quads[8];  // four rows of four bytes, rows 0-3 or 4-7, then 8-11 or 12-15
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        const __m256i a = _mm256_unpacklo_epi8(both[i], both[i + 1]), b = _mm256_unpackhi_epi8(both[i], both[i + 1]);
        const __m256i c = _mm256_unpacklo_epi8(both[i + 2], both[i + 3]);
        const __m256i d = _mm256_unpackhi_epi8(both[i + 2], both[i + 3]);
        quads[i] = _mm256_unpacklo_epi16(a, c);
        quads[i + 1] = _mm256_unpackhi_epi16(a, c);
        quads[i + 2] = _mm256_unpacklo_epi16(b, d);
        quads[i + 3] = _mm256_unpackhi_epi16(b, d);
    }
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m256i low = quads[i / 2], high = quads[i / 2 + 4];
        const __m256i bytes = i % 2 ? _mm256_unpackhi_epi32(low, high) : _mm256_unpacklo_epi32(low, high);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            __m256i values[2];
            look_up(_mm256_and_si256(odd ? _mm256_srli_epi16(bytes, 4) : bytes, nibble), values);
#pragma GCC unroll 2
            for (int byte = 0; byte < 2; ++byte) {
                float* at = out + (4 * i + 2 * byte + odd) * kColumns;
                _mm256_storeu_ps(at, _mm256_mul_ps(lower_floats(values[byte]), scale0));
                _mm256_storeu_ps(at + 8, _mm256_mul_ps(upper_floats(values[byte]), scale1));
            }
        }
    }
}

TARGET void decode_columns(const Weight& w, int64_t row, int64_t input, int64_t depth, float* panel) {
    const float* values = scale_values();
    const int64_t num_blocks = depth / kBlock;
    alignas(32) float scales[kDepth / kBlock][kColumns];
    for (int n = 0; n < kColumns; ++n) {
        const uint8_t* scale = w.scale(row + n, input / kBlock);
        for (int64_t b = 0; b < num_blocks; ++b) scales[b][n] = values[scale[b]];
    }
    for (int64_t b = 0; b < num_blocks; ++b)
        for (int n = 0; n < kColumns; n += 16)
            decode_16_rows(w.at(row + n, input + b * kBlock), w.row_bytes(), _mm256_load_ps(scales[b] + n),
                           _mm256_load_ps(scales[b] + n + 8), panel + b * kBlock * kColumns + n);
}

TARGET inline void decode_block(const uint8_t* bytes, vec out[kBlock / WIDTH]) {
    // Bytes 0 and 1 of every four to the lower half, 2 and 3 to the upper one.
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                           2, 3, 6, 7, 10, 11, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i ordered = _mm256_shuffle_epi8(twice, order);
    const __m256i even = _mm256_and_si256(ordered, nibble);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(ordered, 4), nibble);
    __m256i values[2];
    look_up(_mm256_unpacklo_epi8(even, odd), values);
    const __m256 eights[4] = {lower_floats(values[0]), upper_floats(values[0]), lower_floats(values[1]),
                              upper_floats(values[1])};
#pragma GCC unroll 4
    for (int i = 0; i < kBlock / WIDTH; ++i) out[i] = join(eights + i * WIDTH / 8);
}

// Even weights to the lower half, odd ones to the upper one; there, of every two, the first by a shift and the second
// by a mask. Half as many shuffles, which were the bottleneck.
TARGET inline void decode_quickly(const uint8_t* bytes, vec out[kBlock / WIDTH]) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i shifted = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    const __m256i second = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    __m256i values[2];
    look_up(_mm256_and_si256(shifted, _mm256_set1_epi8(15)), values);
    __m256 eights[4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        eights[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(values[i], 16));
        eights[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(values[i], second));
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBlock / WIDTH; ++i) out[i] = join(eights + i * WIDTH / 8);
}

int quick_order(int i) { return i / 16 * 16 + i % 4 * 4 + i / 4 % 2 + i / 8 % 2 * 2; }
