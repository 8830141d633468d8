#include "experts.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"

namespace gptoss_ft {
namespace {

constexpr int64_t kRowRun = 16;    // rows of elementwise work a thread takes at a time
constexpr int64_t kDownRows = 48;  // of 2880 bf16 columns they stay in the L2 cache while every rank passes over them

template <class Void>
Void* at(Void* from, DType dtype, int64_t elements) {
    using Byte = std::conditional_t<std::is_const_v<Void>, const uint8_t, uint8_t>;
    return static_cast<Byte*>(from) + bytes_of(dtype, elements);
}

int64_t first_row(const LowRankFactor& factor, int64_t expert) { return expert ? factor.ends[expert - 1] : 0; }

bool is_adapted(const LowRankFactor& factor, int64_t expert) { return !factor.adapted || factor.adapted[expert]; }

// Calls `work(expert, first column, columns)` for every strip of every expert.
template <class Work>
void for_each_strip(int threads, const LowRankFactor& factor, const Work& work) {
    const int64_t strips = (factor.columns + kStrip - 1) / kStrip;
    for_each_item(threads, factor.num_experts * strips, 1, [&] {
        return [&](int64_t item) {
            const int64_t column = item % strips * kStrip;
            work(item / strips, column, std::min(kStrip, factor.columns - column));
        };
    });
}

void* element(const LowRankFactor& factor, int64_t expert, int64_t column) {
    return at(factor.data, DType(factor.dtype), expert * factor.expert_stride + column);
}

}  // namespace

void swiglu(const ExpertKernels& kernels, int threads, const SwiGLU& of, DType dtype, const void* gate_up, void* act) {
    for_each_item(threads, of.rows, kRowRun, [&] {
        return [&](int64_t row) {
            kernels.swiglu(of, at(gate_up, dtype, 2 * row * of.columns), at(act, dtype, row * of.columns));
        };
    });
}

void swiglu_backward(const ExpertKernels& kernels, int threads, const SwiGLU& of, DType dtype, const void* gate_up,
                     const void* d_z, const float* weights, void* z, void* d_gate_up, float* d_weights) {
    for_each_item(threads, of.rows, kRowRun, [&] {
        return [&](int64_t row) {
            const int64_t from = row * of.columns;
            d_weights[row] = kernels.swiglu_backward(of, at(gate_up, dtype, 2 * from), at(d_z, dtype, from), weights[row],
                                                     at(z, dtype, from), at(d_gate_up, dtype, 2 * from));
        };
    });
}

void combine(const ExpertKernels& kernels, int threads, DType dtype, const void* y, const int64_t* slots,
             const float* weights, int64_t tokens, int64_t choices, int64_t columns, void* out) {
    for_each_item(threads, tokens, kRowRun, [&] {
        return [&](int64_t t) {
            kernels.combine(y, slots + t * choices, weights ? weights + t * choices : nullptr, choices, columns,
                            at(out, dtype, t * columns));
        };
    });
}

void low_rank_down(const ExpertKernels& kernels, int threads, DType dtype, const void* x, const LowRankFactor& factor,
                   float* h) {
    struct Rows {
        int64_t expert, first, count;
    };
    std::vector<Rows> items;
    for (int64_t e = 0; e < factor.num_experts; ++e)
        for (int64_t first = first_row(factor, e); first < factor.ends[e]; first += kDownRows)
            items.push_back({e, first, std::min(kDownRows, factor.ends[e] - first)});
    for_each_item(threads, static_cast<int64_t>(items.size()), 1, [&] {
        return [&](int64_t item) {
            const auto [expert, first, count] = items[item];
            float* to = h + first * factor.ranks;
            if (is_adapted(factor, expert))
                kernels.down(at(x, dtype, first * factor.columns), count, element(factor, expert, 0),
                             factor.rank_stride, factor.ranks, factor.columns, to);
            else
                std::fill_n(to, count * factor.ranks, 0.f);
        };
    });
}

void low_rank_up(const ExpertKernels& kernels, int threads, DType dtype, const float* h, const LowRankFactor& factor,
                 float scale, void* y) {
    for_each_strip(threads, factor, [&](int64_t expert, int64_t column, int64_t count) {
        const int64_t first = first_row(factor, expert), rows = factor.ends[expert] - first;
        if (rows > 0 && is_adapted(factor, expert))
            kernels.up(h + first * factor.ranks, rows, scale, element(factor, expert, column), factor.rank_stride,
                       factor.ranks, count, at(y, dtype, first * factor.columns + column), factor.columns);
    });
}

void low_rank_gradient(const ExpertKernels& kernels, int threads, DType dtype, const float* h, const void* x,
                       float scale, const LowRankFactor& factor) {
    for_each_strip(threads, factor, [&](int64_t expert, int64_t column, int64_t count) {
        const int64_t first = first_row(factor, expert);
        const int64_t rows = is_adapted(factor, expert) ? factor.ends[expert] - first : 0;
        kernels.gradient(h + first * factor.ranks, rows, scale, at(x, dtype, first * factor.columns + column),
                         factor.columns, factor.ranks, count, element(factor, expert, column), factor.rank_stride);
    });
}

}  // namespace gptoss_ft
