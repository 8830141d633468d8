// Vector code compiled once for every instruction set. A file that includes this, inside its own namespace, has
// defined BODY, the name of the header with the code. That is included in a namespace for each instruction set, with
// TARGET, the function attribute of its instructions, and WIDTH, the fp32 lanes of its vectors.
#include "targets.h"

namespace portable {
#define TARGET
#define WIDTH 4
#include BODY
#undef TARGET
#undef WIDTH
}  // namespace portable

#ifdef GPTOSS_FT_X86
namespace avx2 {
#define TARGET AVX2_TARGET
#define WIDTH 8
#include BODY
#undef TARGET
#undef WIDTH
}  // namespace avx2

namespace avx512 {
#define TARGET AVX512_TARGET
#define WIDTH 16
#include BODY
#undef TARGET
#undef WIDTH
}  // namespace avx512

// The function or constant of the body that goes with an instruction set.
#define OF_ISA(isa, ...) \
    ((isa) == kAvx512Bf16 ? avx512::__VA_ARGS__ : (isa) == kAvx2 ? avx2::__VA_ARGS__ : portable::__VA_ARGS__)
#else
#define OF_ISA(isa, ...) portable::__VA_ARGS__
#endif
