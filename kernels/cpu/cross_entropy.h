// Softmax cross entropy of rows of logits for any vector width. Included by cross_entropy.cpp once for every
// instruction set, inside a namespace, after it has defined TARGET and WIDTH.

typedef float vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint16_t hvec __attribute__((vector_size(WIDTH * sizeof(uint16_t))));

TARGET static inline vec load(const float* from) {
    vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
TARGET static inline vec load(const uint16_t* from) {
    hvec half;
    std::memcpy(&half, from, sizeof half);
    return (vec)(__builtin_convertvector(half, ivec) << 16);
}
TARGET static inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }
TARGET static inline void store(uint16_t* to, vec value) {
    // To nearest, ties to even; neither infinite nor NaN, since probabilities and their products with weights are not.
    const ivec bits = (ivec)value, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const hvec half = __builtin_convertvector((rounded >> 16) & 0xffff, hvec);
    std::memcpy(to, &half, sizeof half);
}

// e^x for x <= 0 within 2 units in the last place of fp32; below -87, where it would be subnormal, 0.
TARGET static inline vec exp_negative(vec x) {
    const vec magic = vec{} + 0x1.8p23f;  // adding it rounds to an integer, in the low bits of the sum
    const vec shifted = x * 0x1.715476p0f + magic;
    const vec n = shifted - magic;
    const vec r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    vec p = r * (1.f / 5040) + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + .5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    const vec scaled = (vec)((ivec)p + ((ivec)shifted << 23));
    return (vec)((ivec)scaled & (x > -87.f));
}

TARGET static inline float sum(vec value) {
    float total = 0;
    for (int i = 0; i < WIDTH; ++i) total += value[i];
    return total;
}

// Replace a row of logits by weight * (softmax - one-hot of target); returns its cross entropy in nats.
template <class T>
TARGET double row_in_place(T* row, int64_t count, int64_t target, float weight) {
    const int64_t whole = count / WIDTH * WIDTH;
    const vec lowest = vec{} - INFINITY;
    vec top = lowest;
    for (int64_t i = 0; i < whole; i += WIDTH) {
        const vec x = load(row + i);
        top = x > top ? x : top;
    }
    float highest = -INFINITY;
    for (int i = 0; i < WIDTH; ++i) highest = std::max(highest, top[i]);
    T padded[WIDTH];  // what is left over, its missing lanes at -infinity
    store(padded, lowest);
    std::memcpy(padded, row + whole, (count - whole) * sizeof(T));
    const vec rest = load(padded);
    for (int i = 0; i < WIDTH; ++i) highest = std::max(highest, rest[i]);

    const float logit = load_one(row + target);
    // A vocabulary of fp32 sums in a fixed order: 4 vectors keep additions from waiting for each other.
    vec sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * WIDTH <= whole; i += 4 * WIDTH)
        for (int part = 0; part < 4; ++part) sums[part] += exp_negative(load(row + i + part * WIDTH) - highest);
    for (; i < whole; i += WIDTH) sums[0] += exp_negative(load(row + i) - highest);
    sums[1] += exp_negative(rest - highest);
    const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));

    const float scale = weight / total;
    for (i = 0; i < whole; i += WIDTH) store(row + i, exp_negative(load(row + i) - highest) * scale);
    store(padded, exp_negative(rest - highest) * scale);
    std::memcpy(row + whole, padded, (count - whole) * sizeof(T));
    const float probability = sum(exp_negative(vec{} + (logit - highest))) / WIDTH / total;
    store_one(weight * (probability - 1.f), row + target);
    return std::log(static_cast<double>(total)) - (static_cast<double>(logit) - highest);
}
