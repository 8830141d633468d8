// MXFP4 (OCP MX v1.0) as gpt-oss checkpoints store it, and bf16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace gptoss_ft {

constexpr int64_t kBlock = 32;                // weights that share one scale
constexpr int64_t kBlockBytes = kBlock / 2;   // two e2m1 codes a byte, the low nibble first
constexpr int kE8M0NaN = 255;
constexpr float kE2M1[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

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
