// Vectors of WIDTH fp32 lanes. A file that includes this has defined TARGET, the function attribute of its instructions,
// and WIDTH.
// Compiler vectors instead of intrinsics: the same lines become SSE2 or NEON, AVX2 and AVX-512.

typedef float vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t ints __attribute__((vector_size(WIDTH * sizeof(int32_t))));
typedef uint32_t bits __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
typedef uint16_t halves __attribute__((vector_size(WIDTH * sizeof(uint16_t))));

// Shuffles take constants only: lanes 0 to WIDTH - 1 are those of a, the following those of b.
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ints{__VA_ARGS__})
#endif

TARGET static inline vec load(const float* from) {
    vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
TARGET static inline vec load(const uint16_t* from) {
    halves value;
    std::memcpy(&value, from, sizeof value);
    return (vec)(__builtin_convertvector(value, bits) << 16);
}

// Subtracting zero keeps every value, -0 included, so compilers reduce this to a broadcast.
TARGET static inline vec broadcast(float value) { return value - vec{}; }
TARGET static inline vec maximum(vec a, vec b) { return a > b ? a : b; }
TARGET static inline vec minimum(vec a, vec b) { return a < b ? a : b; }
TARGET static inline vec select(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }

TARGET static inline bits rounded_to_bf16(vec value) {
    const bits all = (bits)value;
    const bits rounded = (all + 0x7fff + (all >> 16 & 1)) >> 16;
    return value == value ? rounded : bits{} + 0x7fc0;
}
TARGET static inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }
TARGET static inline void store(uint16_t* to, vec value) {
    const halves rounded = __builtin_convertvector(rounded_to_bf16(value), halves);
    std::memcpy(to, &rounded, sizeof rounded);
}

// The first `count` of WIDTH elements; the rest of what is loaded is zero.
template <class T>
TARGET static inline vec load_some(const T* from, int64_t count) {
    if (count >= WIDTH) return load(from);
    T all[WIDTH] = {};
    std::memcpy(all, from, count * sizeof(T));
    return load(all);
}
template <class T>
TARGET static inline void store_some(T* to, vec value, int64_t count) {
    if (count >= WIDTH) return store(to, value);
    T all[WIDTH];
    store(all, value);
    std::memcpy(to, all, count * sizeof(T));
}

// A lane's partner is the one whose number differs in one bit.
template <int BIT, int... LANE>
TARGET static inline vec partners(vec value, std::integer_sequence<int, LANE...>) {
    return SHUFFLE(value, value, (LANE ^ BIT)...);
}
constexpr auto kLanes = std::make_integer_sequence<int, WIDTH>();

template <int BIT = WIDTH / 2>
TARGET static inline float largest(vec value) {
    value = maximum(value, partners<BIT>(value, kLanes));
    if constexpr (BIT > 1) return largest<BIT / 2>(value);
    return value[0];
}
template <int BIT = WIDTH / 2>
TARGET static inline float sum(vec value) {
    value += partners<BIT>(value, kLanes);
    if constexpr (BIT > 1) return sum<BIT / 2>(value);
    return value[0];
}

// Exchange the off-diagonal halves of all blocks of 2 * HALF lanes in 2 * HALF rows.
template <int HALF, int... LANE>
TARGET static inline void transpose(vec (&rows)[WIDTH], std::integer_sequence<int, LANE...> lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) {
        if (i & HALF) continue;
        const vec a = rows[i], b = rows[i + HALF];
        rows[i] = SHUFFLE(a, b, (LANE & HALF ? LANE - HALF + WIDTH : LANE)...);
        rows[i + HALF] = SHUFFLE(a, b, (LANE & HALF ? LANE + WIDTH : LANE + HALF)...);
    }
    if constexpr (HALF > 1) transpose<HALF / 2>(rows, lanes);
}

// 2^t for t <= 127, within 1.4 * 2^-24 of its value; below -126 it is zero, and NaN stays NaN.
// t is a whole number, which adding 1.5 * 2^23 leaves in the lowest bits, and a fraction in [-0.5, 0.5], for which the
// polynomial has the smallest largest relative error of its degree (2^-29).
TARGET static inline vec exp2(vec t) {
    const vec shifted = t + 0x1.8p23f;
    const vec f = t - (shifted - 0x1.8p23f);
    vec p = broadcast(0x1.41d334p-13f);
    p = p * f + 0x1.5f456ap-10f;
    p = p * f + 0x1.3b2dbcp-7f;
    p = p * f + 0x1.c6aed4p-5f;
    p = p * f + 0x1.ebfbdap-3f;
    p = p * f + 0x1.62e430p-1f;
    p = p * f + 1.f;
    const vec scaled = (vec)((bits)p + ((bits)shifted << 23));
    return t < -126.f ? vec{} : scaled;
}
