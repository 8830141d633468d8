// AVX-512 in plain loops, for tests of gemm_avx512.cpp on processors without it. Found before the compiler's header of
// this name, which it includes for everything up to AVX2. It has the instructions that the library uses, as Intel's
// Intrinsics Guide defines them; a new one fails to compile until it is added. Aligned accesses abort where the
// processor would fault.
#pragma once

#include_next <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace emulation {

template <class T, class V>
struct Lanes {
    static constexpr int kCount = sizeof(V) / sizeof(T);
    T at[kCount];
    Lanes() = default;
    explicit Lanes(const V& value) { std::memcpy(at, &value, sizeof value); }
    V value() const {
        V value;
        std::memcpy(&value, at, sizeof value);
        return value;
    }
};

template <class V>
V load(const void* from, size_t alignment = 1) {
    if (reinterpret_cast<uintptr_t>(from) % alignment) std::abort();
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class V>
void store(void* to, const V& value, size_t alignment = 1) {
    if (reinterpret_cast<uintptr_t>(to) % alignment) std::abort();
    std::memcpy(to, &value, sizeof value);
}

template <class T, class V>
V fill(T value) {
    Lanes<T, V> out;
    std::fill_n(out.at, out.kCount, value);
    return out.value();
}

// out[i] = f(i)
template <class T, class V, class F>
V make(const F& f) {
    Lanes<T, V> out;
    for (int i = 0; i < out.kCount; ++i) out.at[i] = static_cast<T>(f(i));
    return out.value();
}

template <class T, class V, class F>
V map(const V& a, const V& b, const F& f) {
    const Lanes<T, V> x(a), y(b);
    return make<T, V>([&](int i) { return f(x.at[i], y.at[i]); });
}

// Memory behind lanes that the mask leaves out is not touched.
template <class T, class V>
V masked_load(uint64_t mask, const void* from) {
    return make<T, V>([&](int i) {
        T value{};
        if (mask >> i & 1) std::memcpy(&value, static_cast<const T*>(from) + i, sizeof value);
        return value;
    });
}

// Of every 16 bytes of `a` and `b`, the lower or upper half, interleaved.
template <class T>
__m512i unpack(const __m512i& a, const __m512i& b, bool upper) {
    constexpr int group = 16 / sizeof(T);
    const Lanes<T, __m512i> x(a), y(b);
    return make<T, __m512i>([&](int i) {
        const int from = i / group * group + (upper ? group / 2 : 0) + i % group / 2;
        return i % 2 ? y.at[from] : x.at[from];
    });
}

template <class Part, class V>
V insert(const V& into, const Part& part, int index) {
    V out = into;
    std::memcpy(reinterpret_cast<char*>(&out) + index * sizeof part, &part, sizeof part);
    return out;
}

inline float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.f, value) : value; }

inline float bf16_at(const __m512bh& values, int i) {
    const uint32_t bits = static_cast<uint32_t>(Lanes<uint16_t, __m512bh>(values).at[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return flushed(value);
}

// Subnormal operands and results are zero.
inline __m512 dot_pairs(const __m512& sum, const __m512bh& a, const __m512bh& b) {
    const Lanes<float, __m512> start(sum);
    return make<float, __m512>([&](int i) {
        float total = flushed(start.at[i]);
        for (int j = 2 * i + 1; j >= 2 * i; --j) total = flushed(std::fma(bf16_at(a, j), bf16_at(b, j), total));
        return total;
    });
}

}  // namespace emulation

#define EMULATED static inline __attribute__((unused))

EMULATED __m512i emulated_load_si512(const void* from) { return emulation::load<__m512i>(from, 64); }
EMULATED __m512i emulated_loadu_si512(const void* from) { return emulation::load<__m512i>(from); }
EMULATED __m512 emulated_load_ps(const void* from) { return emulation::load<__m512>(from, 64); }
EMULATED void emulated_store_si512(void* to, __m512i value) { emulation::store(to, value, 64); }
EMULATED void emulated_storeu_si512(void* to, __m512i value) { emulation::store(to, value); }
EMULATED void emulated_store_ps(void* to, __m512 value) { emulation::store(to, value, 64); }
EMULATED __m512i emulated_maskz_loadu_epi16(__mmask32 mask, const void* from) {
    return emulation::masked_load<uint16_t, __m512i>(mask, from);
}
EMULATED __m256i emulated_256_maskz_loadu_epi8(__mmask32 mask, const void* from) {
    return emulation::masked_load<uint8_t, __m256i>(mask, from);
}
EMULATED __m128i emulated_128_maskz_loadu_epi8(__mmask16 mask, const void* from) {
    return emulation::masked_load<uint8_t, __m128i>(mask, from);
}
EMULATED __m256i emulated_256_maskz_mov_epi32(__mmask8 mask, __m256i a) {
    return emulation::masked_load<uint32_t, __m256i>(mask, &a);
}

EMULATED __m512i emulated_setzero_si512() { return emulation::fill<int32_t, __m512i>(0); }
EMULATED __m512 emulated_setzero_ps() { return emulation::fill<float, __m512>(0.f); }
EMULATED __m512i emulated_set1_epi32(int value) { return emulation::fill<int32_t, __m512i>(value); }
EMULATED __m512i emulated_set1_epi64(long long value) { return emulation::fill<int64_t, __m512i>(value); }

// What a cast leaves undefined is poison.
EMULATED __m512i emulated_castsi128_si512(__m128i a) { return emulation::insert(emulated_set1_epi32(-1), a, 0); }
EMULATED __m512i emulated_castsi256_si512(__m256i a) { return emulation::insert(emulated_set1_epi32(-1), a, 0); }
EMULATED __m512 emulated_castps256_ps512(__m256 a) {
    return emulation::insert(emulation::fill<float, __m512>(std::numeric_limits<float>::quiet_NaN()), a, 0);
}
EMULATED __m512i emulated_inserti32x4(__m512i into, __m128i a, int at) { return emulation::insert(into, a, at); }
EMULATED __m512i emulated_inserti64x4(__m512i into, __m256i a, int at) { return emulation::insert(into, a, at); }
EMULATED __m512 emulated_insertf32x8(__m512 into, __m256 a, int at) { return emulation::insert(into, a, at); }

EMULATED __m512i emulated_unpacklo_epi32(__m512i a, __m512i b) { return emulation::unpack<uint32_t>(a, b, false); }
EMULATED __m512i emulated_unpackhi_epi32(__m512i a, __m512i b) { return emulation::unpack<uint32_t>(a, b, true); }
EMULATED __m512i emulated_unpacklo_epi64(__m512i a, __m512i b) { return emulation::unpack<uint64_t>(a, b, false); }
EMULATED __m512i emulated_unpackhi_epi64(__m512i a, __m512i b) { return emulation::unpack<uint64_t>(a, b, true); }
EMULATED __m512i emulated_permutexvar_epi8(__m512i index, __m512i a) {
    const emulation::Lanes<uint8_t, __m512i> from(index), values(a);
    return emulation::make<uint8_t, __m512i>([&](int i) { return values.at[from.at[i] & 63]; });
}
EMULATED __m512i emulated_permutexvar_epi16(__m512i index, __m512i a) {
    const emulation::Lanes<uint16_t, __m512i> from(index), values(a);
    return emulation::make<uint16_t, __m512i>([&](int i) { return values.at[from.at[i] & 31]; });
}
EMULATED __m512i emulated_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    const emulation::Lanes<uint16_t, __m512i> from(index), first(a), second(b);
    return emulation::make<uint16_t, __m512i>([&](int i) {
        return (from.at[i] & 32 ? second : first).at[from.at[i] & 31];
    });
}
EMULATED __m512i emulated_multishift_epi64_epi8(__m512i offsets, __m512i a) {
    const emulation::Lanes<uint8_t, __m512i> offset(offsets);
    const emulation::Lanes<uint64_t, __m512i> words(a);
    return emulation::make<uint8_t, __m512i>([&](int i) {
        const int by = offset.at[i] & 63;
        const uint64_t word = words.at[i / 8];
        return by ? word >> by | word << (64 - by) : word;
    });
}

EMULATED __m512i emulated_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i emulated_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i emulated_sub_epi32(__m512i a, __m512i b) {
    return emulation::map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
EMULATED __m512i emulated_max_epu32(__m512i a, __m512i b) {
    return emulation::map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return std::max(x, y); });
}
EMULATED __m512i emulated_subs_epu16(__m512i a, __m512i b) {
    return emulation::map<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x > y ? x - y : 0; });
}
EMULATED __m512i emulated_srlv_epi16(__m512i a, __m512i by) {
    return emulation::map<uint16_t>(a, by, [](uint16_t x, uint16_t n) { return n < 16 ? x >> n : 0; });
}
EMULATED __m512i emulated_slli_epi32(__m512i a, unsigned by) {
    return emulation::map<uint32_t>(a, a, [&](uint32_t x, uint32_t) { return by < 32 ? x << by : 0; });
}
EMULATED __m512i emulated_srl_epi32(__m512i a, __m128i by) {
    const uint64_t n = emulation::Lanes<uint64_t, __m128i>(by).at[0];
    return emulation::map<uint32_t>(a, a, [&](uint32_t x, uint32_t) { return n < 32 ? x >> n : 0; });
}
EMULATED __m512i emulated_cvtepu8_epi32(__m128i a) {
    const emulation::Lanes<uint8_t, __m128i> from(a);
    return emulation::make<uint32_t, __m512i>([&](int i) { return from.at[i]; });
}
EMULATED __m512i emulated_cvtepu16_epi32(__m256i a) {
    const emulation::Lanes<uint16_t, __m256i> from(a);
    return emulation::make<uint32_t, __m512i>([&](int i) { return from.at[i]; });
}

EMULATED __m512 emulated_add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 emulated_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) { return emulation::dot_pairs(sum, a, b); }
EMULATED float emulated_reduce_add_ps(__m512 a) {
    emulation::Lanes<float, __m512> sums(a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) sums.at[i] += sums.at[i + half];
    return sums.at[0];
}
EMULATED unsigned emulated_reduce_max_epu32(__m512i a) {
    const emulation::Lanes<uint32_t, __m512i> lanes(a);
    return *std::max_element(lanes.at, lanes.at + lanes.kCount);
}

#undef _mm512_load_si512
#define _mm512_load_si512 emulated_load_si512
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated_loadu_si512
#undef _mm512_load_ps
#define _mm512_load_ps emulated_load_ps
#undef _mm512_store_si512
#define _mm512_store_si512 emulated_store_si512
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated_storeu_si512
#undef _mm512_store_ps
#define _mm512_store_ps emulated_store_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emulated_maskz_loadu_epi16
#undef _mm256_maskz_loadu_epi8
#define _mm256_maskz_loadu_epi8 emulated_256_maskz_loadu_epi8
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 emulated_128_maskz_loadu_epi8
#undef _mm256_maskz_mov_epi32
#define _mm256_maskz_mov_epi32 emulated_256_maskz_mov_epi32
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated_setzero_si512
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated_setzero_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated_set1_epi32
#undef _mm512_set1_epi64
#define _mm512_set1_epi64 emulated_set1_epi64
#undef _mm512_castsi128_si512
#define _mm512_castsi128_si512 emulated_castsi128_si512
#undef _mm512_castsi256_si512
#define _mm512_castsi256_si512 emulated_castsi256_si512
#undef _mm512_castps256_ps512
#define _mm512_castps256_ps512 emulated_castps256_ps512
#undef _mm512_inserti32x4
#define _mm512_inserti32x4 emulated_inserti32x4
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 emulated_inserti64x4
#undef _mm512_insertf32x8
#define _mm512_insertf32x8 emulated_insertf32x8
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated_unpackhi_epi64
#undef _mm512_permutexvar_epi8
#define _mm512_permutexvar_epi8 emulated_permutexvar_epi8
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 emulated_permutexvar_epi16
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 emulated_permutex2var_epi16
#undef _mm512_multishift_epi64_epi8
#define _mm512_multishift_epi64_epi8 emulated_multishift_epi64_epi8
#undef _mm512_and_si512
#define _mm512_and_si512 emulated_and_si512
#undef _mm512_or_si512
#define _mm512_or_si512 emulated_or_si512
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated_sub_epi32
#undef _mm512_max_epu32
#define _mm512_max_epu32 emulated_max_epu32
#undef _mm512_subs_epu16
#define _mm512_subs_epu16 emulated_subs_epu16
#undef _mm512_srlv_epi16
#define _mm512_srlv_epi16 emulated_srlv_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated_slli_epi32
#undef _mm512_srl_epi32
#define _mm512_srl_epi32 emulated_srl_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#undef _mm512_add_ps
#define _mm512_add_ps emulated_add_ps
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#undef _mm512_reduce_max_epu32
#define _mm512_reduce_max_epu32 emulated_reduce_max_epu32
