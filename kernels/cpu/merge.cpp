// Merging low-rank updates into frozen weights: base + B A, rounded to what a merged checkpoint holds.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#include "mxfp4.h"
#include "parallel.h"

namespace gptoss_ft {
namespace {

constexpr int64_t kStripBlocks = 4;  // 64 bytes of a row's blocks: one line of the cache
constexpr int64_t kRunRows = 64;     // rows for which a strip of A is reordered once

constexpr uint32_t kGoldenRatio = 0x9e3779b9;

// What is added to the dither of an element for its place in a block; even places first.
constexpr std::array<uint32_t, kBlock> dither_steps() {
    std::array<uint32_t, kBlock> steps{};
    for (int64_t i = 0; i < kBlock; ++i) steps[i] = (2 * (i % kBlockBytes) + i / kBlockBytes) * kGoldenRatio;
    return steps;
}
alignas(64) constexpr std::array<uint32_t, kBlock> kDitherSteps = dither_steps();

inline uint32_t hash_of_block(const uint8_t* block) {
    uint32_t words[kBlockBytes / 4], hash = 0;
    std::memcpy(words, block, sizeof words);
    for (const uint32_t word : words) {
        hash = (hash ^ word) * kGoldenRatio;
        hash ^= hash >> 15;
    }
    return hash;
}

struct PackedMerge {
    const uint8_t* base_blocks;  // [experts, rows, groups, 16]
    const uint8_t* base_scales;  // [experts, rows, groups]
    const float* A;              // [experts, rank, 32 * groups]
    const float* B;              // [rank, experts, rows], the scaling in it
    uint8_t* blocks;
    uint8_t* scales;
    int64_t experts, rows, groups, rank;
};

struct DenseMerge {
    DType dtype;
    const void* base;  // [rows, columns]
    const float* A;    // [rank, columns]
    const float* B;    // [rows, rank], the scaling in it
    void* out;
    int64_t columns, rank;
};

#define BODY "merge.h"
#include "by_isa.h"

}  // namespace
}  // namespace gptoss_ft

// `dithered` chooses the rounding. `wanted` are the numbers of the `count` experts to merge; the others' bytes are not
// written.
extern "C" __attribute__((visibility("default"))) int gptoss_ft_merge_mxfp4(
    int isa, int threads, int dithered, const uint8_t* base_blocks, const uint8_t* base_scales, const float* A,
    const float* B, const int64_t* wanted, int64_t count, int64_t experts, int64_t rows, int64_t groups, int64_t rank,
    uint8_t* blocks, uint8_t* scales) {
    using namespace gptoss_ft;
    const auto merge_rows = dithered ? OF_ISA(isa, merge_packed_rows<true>) : OF_ISA(isa, merge_packed_rows<false>);
    const PackedMerge all{base_blocks, base_scales, A, B, blocks, scales, experts, rows, groups, rank};
    const int64_t runs = ceil_div(rows, kRunRows);
    const int64_t strips = kStripBlocks * kBlock * rank;
    for_each_item(threads, count * runs, 1, [&] {
        return [&, scratch = std::vector<float>(strips + kRunRows * rank)](int64_t item) mutable {
            const int64_t first = item % runs * kRunRows;
            merge_rows(all, wanted[item / runs], first, std::min(kRunRows, rows - first), scratch.data(),
                       scratch.data() + strips);
        };
    });
    return 0;
}

extern "C" __attribute__((visibility("default"))) int gptoss_ft_merge_bf16(
    int isa, int threads, int dtype, const void* base, const float* A, const float* B, int64_t rows, int64_t columns,
    int64_t rank, void* out) {
    using namespace gptoss_ft;
    const auto merge_row = OF_ISA(isa, merge_dense_rows);
    const DenseMerge all{static_cast<DType>(dtype), base, A, B, out, columns, rank};
    for_each_item(threads, rows, 16, [&] { return [&](int64_t row) { merge_row(all, row); }; });
    return 0;
}
