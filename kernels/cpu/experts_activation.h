// Clamped SwiGLU and the sum over a token's experts, a row at a time. Part of experts_impl.h.

// WIDTH interleaved pairs, or the first `count` of them.
TARGET static inline void load_pairs(const uint16_t* from, int64_t count, vec& gate, vec& up) {
    // A pair is one little-endian word, whose halves are the high halves of two floats.
    bits words = {};
    if (count >= WIDTH)
        std::memcpy(&words, from, sizeof words);
    else
        std::memcpy(&words, from, count * sizeof(uint32_t));
    gate = (vec)(words << 16);
    up = (vec)(words & 0xffff0000u);
}
TARGET static inline void load_pairs(const float* from, int64_t count, vec& gate, vec& up) {
    float pairs[2 * WIDTH] = {};
    std::memcpy(pairs, from, (count < WIDTH ? count : WIDTH) * 2 * sizeof(float));
    for (int i = 0; i < WIDTH; ++i) {
        gate[i] = pairs[2 * i];
        up[i] = pairs[2 * i + 1];
    }
}
TARGET static inline void store_pairs(uint16_t* to, int64_t count, vec gate, vec up) {
    const bits words = rounded_to_bf16(gate) | rounded_to_bf16(up) << 16;
    std::memcpy(to, &words, count < WIDTH ? count * sizeof(uint32_t) : sizeof words);
}
TARGET static inline void store_pairs(float* to, int64_t count, vec gate, vec up) {
    float pairs[2 * WIDTH];
    for (int i = 0; i < WIDTH; ++i) {
        pairs[2 * i] = gate[i];
        pairs[2 * i + 1] = up[i];
    }
    std::memcpy(to, pairs, (count < WIDTH ? count : WIDTH) * 2 * sizeof(float));
}

// Comparisons are such that NaN stays NaN, as in torch.
TARGET static inline vec at_most(vec value, float limit) { return value > limit ? broadcast(limit) : value; }
TARGET static inline vec at_least(vec value, float limit) { return value < limit ? broadcast(limit) : value; }

// 1 / (1 + e^-(alpha * gate)). The power is kept finite: beyond 2^127 the result is zero for every use there is.
TARGET static inline vec sigmoid(float alpha, vec gate) {
    constexpr float log2e = 0x1.715476p0f;
    return 1.f / (1.f + exp2(at_most(gate * (-alpha * log2e), 127.f)));
}

template <class T>
TARGET void swiglu_row(const SwiGLU& of, const void* gate_up, void* act) {
    const auto* pairs = static_cast<const T*>(gate_up);
    for (int64_t i = 0; i < of.columns; i += WIDTH) {
        vec gate, up;
        load_pairs(pairs + 2 * i, of.columns - i, gate, up);
        gate = at_most(gate, of.limit);
        up = at_least(at_most(up, of.limit), -of.limit);
        store_some(static_cast<T*>(act) + i, (up + 1.f) * (gate * sigmoid(of.alpha, gate)), of.columns - i);
    }
}

template <class T>
TARGET float swiglu_row_backward(const SwiGLU& of, const void* gate_up, const void* d_z, float weight, void* z,
                                 void* d_gate_up) {
    const auto* pairs = static_cast<const T*>(gate_up);
    vec d_weight = {};
    for (int64_t i = 0; i < of.columns; i += WIDTH) {
        const int64_t count = of.columns - i;
        vec raw_gate, raw_up;
        load_pairs(pairs + 2 * i, count, raw_gate, raw_up);
        const vec gate = at_most(raw_gate, of.limit), up = at_least(at_most(raw_up, of.limit), -of.limit);
        const vec share = sigmoid(of.alpha, gate), glu = gate * share, act = (up + 1.f) * glu;
        const vec d_product = load_some(static_cast<const T*>(d_z) + i, count), d_act = weight * d_product;
        d_weight += d_product * act;
        store_some(static_cast<T*>(z) + i, weight * act, count);
        // As torch differentiates clamp: a value at the limit still has a gradient.
        const vec d_gate = d_act * (up + 1.f) * (share + of.alpha * glu * (1.f - share)), d_up = d_act * glu;
        store_pairs(static_cast<T*>(d_gate_up) + 2 * i, count, raw_gate <= of.limit ? d_gate : vec{},
                    (raw_up <= of.limit) & (raw_up >= -of.limit) ? d_up : vec{});
    }
    return sum(d_weight);
}

template <class T>
TARGET void combine_row(const void* y, const int64_t* slots, const float* weights, int64_t choices, int64_t columns,
                        void* out) {
    for (int64_t i = 0; i < columns; i += WIDTH) {
        vec total = {};
        for (int64_t k = 0; k < choices; ++k) {
            const vec part = load_some(static_cast<const T*>(y) + slots[k] * columns + i, columns - i);
            total += weights ? weights[k] * part : part;
        }
        store_some(static_cast<T*>(out) + i, total, columns - i);
    }
}
