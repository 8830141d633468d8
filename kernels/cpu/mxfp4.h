// MXFP4 (OCP MX v1.0) as gpt-oss checkpoints store it, and the two element types of activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace gptoss_ft {

constexpr int64_t kBlock = 32;                // weights that share one scale
constexpr int64_t kBlockBytes = kBlock / 2;   // two e2m1 codes a byte, the low nibble first
constexpr int kE8M0NaN = 255;
constexpr float kE2M1[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };

inline size_t size_of(DType dtype) { return dtype == kBFloat16 ? 2 : 4; }

// One expert's projection, `[rows, 32 * row_blocks]`. The bytes may lie at any address of a mapped file.
struct Weight {
    const uint8_t* blocks;  // [rows, row_blocks, 16]
    const uint8_t* scales;  // [rows, row_blocks], e8m0
    int64_t row_blocks;

    const uint8_t* block(int64_t row, int64_t b) const { return blocks + (row * row_blocks + b) * kBlockBytes; }
    const uint8_t* scale(int64_t row, int64_t b) const { return scales + row * row_blocks + b; }
};

// Ask for `bytes` bytes to be brought into the L2 cache. Addresses beyond the mapping do no harm.
inline void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

inline float float_from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// 2^(e - 127). Byte 0 is subnormal in fp32 and byte 255 is NaN.
inline float e8m0_value(int e) {
    if (e == kE8M0NaN) return float_from_bits(0x7fc00000);
    return float_from_bits(e == 0 ? 0x00400000u : static_cast<uint32_t>(e) << 23);
}

inline float float_from_bf16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN instead of being rounded to infinity.
inline uint16_t bf16_from_float(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

}  // namespace gptoss_ft
