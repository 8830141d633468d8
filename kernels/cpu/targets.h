// The instruction sets that functions are compiled for, whatever the rest of the library is: processors that lack them
// never call these functions.
#pragma once

#define AVX2_TARGET __attribute__((target("avx2,fma")))
// Tests emulate AVX-512 on processors without it and compile these functions for what those have.
#ifndef AVX512_FEATURES
#define AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma"
#endif
#define AVX512_TARGET __attribute__((target(AVX512_FEATURES)))
