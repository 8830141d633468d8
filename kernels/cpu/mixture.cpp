#include "mixture.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "buffer.h"
#include "parallel.h"

namespace gptoss_ft {
namespace {

// Pieces of work are small, because at the end of each part of the block threads wait for the last one.
constexpr int64_t kGateUpColumns = 4 * kBlock;
constexpr int64_t kDownColumns = 2 * kBlock;

// At most kFewRows rows of one expert, consecutive once the choices are sorted by expert.
struct Group {
    int64_t expert, first, rows;
};

std::vector<Group> groups_of(const int64_t* experts, const std::vector<int64_t>& order) {
    std::vector<Group> groups;
    for (int64_t i = 0; i < static_cast<int64_t>(order.size()); ++i) {
        const int64_t expert = experts[order[i]];
        if (groups.empty() || groups.back().expert != expert || groups.back().rows == kFewRows)
            groups.push_back({expert, i, 0});
        ++groups.back().rows;
    }
    return groups;
}

// The inputs of one projection, sorted, and as its kernels want them.
class Inputs {
public:
    Inputs(const Kernels& kernels, DType dtype, int64_t rows, size_t num_groups, int64_t depth)
        : kernels_(kernels),
          dtype_(dtype),
          depth_(depth),
          room_(padded_depth(depth) * kernels.tile_bytes),
          rows_(bytes_of(dtype, rows * depth)),
          packed_(kernels.pack_few ? num_groups * room_ : 0) {}

    uint8_t* row(int64_t row) const { return rows_.at(bytes_of(dtype_, row * depth_)); }
    void pack(const Group& group, size_t index) const {
        if (kernels_.pack_few)
            kernels_.pack_few(row(group.first), depth_, group.rows, depth_, packed_.at(index * room_));
    }
    const void* packed(const Group& group, size_t index) const {
        return kernels_.pack_few ? packed_.at(index * room_) : row(group.first);
    }

private:
    const Kernels& kernels_;
    DType dtype_;
    int64_t depth_;
    size_t room_;
    Buffer rows_, packed_;
};

// Columns [column, column + width) of a projection of a group, as [rows][width].
void project(const Kernels& kernels, const Experts& experts, const void* bias, DType bias_dtype, const Group& group,
             const void* x, int64_t column, int64_t width, DType dtype, uint8_t* y) {
    const Weight weight = experts.weight(group.expert);
    alignas(64) float sums[kFewRows * kBlock];
    float add[kBlock];
    for (int64_t n = 0; n < width; n += kernels.columns) {
        kernels.forward_few(x, experts.in, group.rows, weight, column + n, sums);
        load_floats(bias, bias_dtype, group.expert * experts.out + column + n, kernels.columns, add);
        kernels.store(sums, group.rows, kernels.columns, add, y + bytes_of(dtype, n), width);
    }
}

}  // namespace

void mixture(const Kernels& kernels, const ExpertKernels& elementwise, int threads, const Mixture& of, DType dtype,
             const void* hidden, const int64_t* experts, const float* weights, int64_t tokens, int64_t choices,
             void* out) {
    const int64_t rows = tokens * choices, width = of.down.out;
    std::vector<int64_t> order(rows), slots(rows);
    for (int64_t i = 0; i < rows; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return experts[a] < experts[b]; });
    for (int64_t i = 0; i < rows; ++i) slots[order[i]] = i;
    const std::vector<Group> groups = groups_of(experts, order);

    const Inputs x(kernels, dtype, rows, groups.size(), of.gate_up.in);
    const Inputs act(kernels, dtype, rows, groups.size(), of.down.in);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t token = order[i] / choices;
        std::memcpy(x.row(i), static_cast<const uint8_t*>(hidden) + bytes_of(dtype, token * of.gate_up.in),
                    bytes_of(dtype, of.gate_up.in));
    }
    for (size_t g = 0; g < groups.size(); ++g) x.pack(groups[g], g);

    const auto activate = [&](const Group& group, size_t index, int64_t strip) {
        const int64_t column = strip * kGateUpColumns, count = std::min(kGateUpColumns, of.gate_up.out - column);
        alignas(64) uint8_t pairs[kFewRows * kGateUpColumns * sizeof(float)];
        project(kernels, of.gate_up, of.gate_up_bias, of.bias_dtype, group, x.packed(group, index), column, count, dtype,
                pairs);
        for (int64_t row = 0; row < group.rows; ++row)
            elementwise.swiglu({1, count / 2, of.alpha, of.limit}, pairs + bytes_of(dtype, row * count),
                               act.row(group.first + row) + bytes_of(dtype, column / 2));
    };
    const auto combine_strip = [&](int64_t strip) {
        const int64_t column = strip * kDownColumns, count = std::min(kDownColumns, width - column);
        alignas(64) uint8_t y[kMixtureRows * kDownColumns * sizeof(float)];
        for (size_t g = 0; g < groups.size(); ++g)
            project(kernels, of.down, of.down_bias, of.bias_dtype, groups[g], act.packed(groups[g], g), column, count,
                    dtype, y + bytes_of(dtype, groups[g].first * count));
        for (int64_t t = 0; t < tokens; ++t)
            elementwise.combine(y, slots.data() + t * choices, weights + t * choices, choices, count,
                                static_cast<uint8_t*>(out) + bytes_of(dtype, t * width + column));
    };

    const int64_t num_groups = static_cast<int64_t>(groups.size());
    const int64_t gate_up_strips = ceil_div(of.gate_up.out, kGateUpColumns), down_strips = ceil_div(width, kDownColumns);
    std::vector<std::atomic<int64_t>> strips_done(groups.size());
    std::atomic<int64_t> next_gate_up{0}, next_down{0}, groups_done{0};
    on_threads(threads, [&] {
        for (int64_t item; (item = next_gate_up.fetch_add(1)) < num_groups * gate_up_strips;) {
            const size_t index = item / gate_up_strips;
            activate(groups[index], index, item % gate_up_strips);
            // Whoever finishes a group packs its activations, which are the inputs of down.
            if (strips_done[index].fetch_add(1) + 1 < gate_up_strips) continue;
            act.pack(groups[index], index);
            groups_done.fetch_add(1);
        }
        // For no more than a strip of another thread, which is less than sleeping costs.
        while (groups_done.load() < num_groups) std::this_thread::yield();
        for (int64_t strip; (strip = next_down.fetch_add(1)) < down_strips;) combine_strip(strip);
    });
}

}  // namespace gptoss_ft
