// The most that bf16 (or fp32, without AVX-512-BF16) arithmetic can do here: independent sums in registers, no memory.
#include <cstdint>

#include "kernels.h"

#ifdef GPTOSS_FT_X86
#include <immintrin.h>

namespace {

constexpr int kSums = 24;  // more than latency times throughput of any processor with these instructions

// Assembly, because a compiler may spill so many sums and would then measure its own stores.
__attribute__((target("avx512f,avx512bf16"))) void run_avx512(int64_t iterations) {
    const __m512i a = _mm512_set1_epi32(0x3f803f80);
    __m512 sum[kSums];
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < iterations; ++k)
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sum[i]) : "v"(a));
}

__attribute__((target("avx2,fma"))) void run_avx2(int64_t iterations) {
    const __m256 a = _mm256_set1_ps(1.f);
    __m256 sum[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sum[i] = _mm256_setzero_ps();
    for (int64_t k = 0; k < iterations; ++k)
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sum[i]) : "x"(a));
}

}  // namespace
#endif

// Runs `iterations` on this thread and returns the floating-point operations done; 0 where there is no such loop.
extern "C" __attribute__((visibility("default"))) int64_t gptoss_ft_register_peak(int isa, int64_t iterations) {
#ifdef GPTOSS_FT_X86
    if (isa == gptoss_ft::kAvx512Bf16) return run_avx512(iterations), iterations * kSums * 64;
    if (isa == gptoss_ft::kAvx2) return run_avx2(iterations), iterations * 12 * 16;
#endif
    (void)isa, (void)iterations;
    return 0;
}
