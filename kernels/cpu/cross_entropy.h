// Softmax cross entropy of rows of logits for any vector width: the body of cross_entropy.cpp for by_isa.h.

#include "vectors.h"

// e^(x - highest) for x up to highest.
TARGET static inline vec share_of(vec x, float highest) { return exp2((x - highest) * 0x1.715476p0f); }

// Replace a row of logits by weight * (softmax - one-hot of target); returns its cross entropy in nats.
template <class T>
TARGET double row_in_place(T* row, int64_t count, int64_t target, float weight) {
    const int64_t whole = count / WIDTH * WIDTH;
    T padded[WIDTH];  // what is left over, its missing lanes at -infinity
    store(padded, broadcast(-INFINITY));
    std::memcpy(padded, row + whole, (count - whole) * sizeof(T));
    const vec rest = load(padded);

    vec top = rest;
    for (int64_t i = 0; i < whole; i += WIDTH) top = maximum(load(row + i), top);
    const float highest = largest(top);
    const float logit = load_some(row + target, 1)[0];

    // Four sums keep additions from waiting for each other.
    vec sums[4] = {share_of(rest, highest)};
    int64_t i = 0;
    for (; i + 4 * WIDTH <= whole; i += 4 * WIDTH)
        for (int part = 0; part < 4; ++part) sums[part] += share_of(load(row + i + part * WIDTH), highest);
    for (; i < whole; i += WIDTH) sums[0] += share_of(load(row + i), highest);
    const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));

    const float scale = weight / total;
    for (i = 0; i < whole; i += WIDTH) store(row + i, share_of(load(row + i), highest) * scale);
    store(padded, share_of(rest, highest) * scale);
    std::memcpy(row + whole, padded, (count - whole) * sizeof(T));
    store_some(row + target, share_of(broadcast(logit), highest) * scale - weight, 1);
    return std::log(static_cast<double>(total)) - (static_cast<double>(logit) - highest);
}
