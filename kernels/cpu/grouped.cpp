#include "grouped.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "buffer.h"
#include "parallel.h"

namespace gptoss_ft {
namespace {

// The sums of this many rows stay in the L2 cache, and decoding again for every further 512 costs about one per cent.
constexpr int64_t kRowBlock = 512;
// dX is made for groups of columns whose panels take 128 KB, which leaves room in L2 for the rest. With narrower pieces
// of weight rows than the 64 bytes (MXFP4 in fp32 panels) that this means, decoding takes longer.
constexpr int64_t kDxGroupBytes = 128 * 1024;
// The widest strips. The wider, the more often a slice of activations is used while it is in L2, and in dX, the more of
// a weight row is read while its page is in the TLB: with 64 rows and dense weights, 1024 columns instead of 256 gave
// 68 instead of 61 % of peak.
constexpr int64_t kForwardWidth = 4 * kBlock;
constexpr int64_t kDxWidth = 128 * kBlock;
constexpr int64_t kSumBytes = 1024 * 1024;  // of a strip: they are read and written once for every slice

// Consecutive rows of one expert, at most kRowBlock, cut into tiles of nearly equal height.
struct RowBlock {
    int64_t expert, first_row, rows, num_tiles;
    size_t packed;  // offset of its tiles

    int64_t tile_start(int64_t tile) const { return tile * rows / num_tiles; }
    int64_t tile_rows(int64_t tile) const { return tile_start(tile + 1) - tile_start(tile); }
};

// All activations in the order in which they are multiplied: [row block][depth / kDepth][tile][kDepth]. Row blocks of
// at most `few` rows are as pack_few leaves them, or left out.
class PackedRows {
public:
    PackedRows(const Kernels& kernels, int threads, const Experts& experts, DType dtype, const void* x, int64_t depth,
               int64_t few)
        : kernels_(kernels), x_(static_cast<const uint8_t*>(x)), dtype_(dtype), depth_(depth) {
        size_t bytes = 0;
        for (int64_t e = 0, start = 0; e < experts.num_experts; start = experts.ends[e++]) {
            const int64_t rows = experts.ends[e] - start, parts = ceil_div(rows, kRowBlock);
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t first = part * rows / parts, count = (part + 1) * rows / parts - first;
                blocks_.push_back({e, start + first, count, ceil_div(count, kernels.tile_rows), bytes});
                bytes += blocks_.back().num_tiles * padded_depth(depth) * kernels.tile_bytes;
            }
        }
        data_ = std::make_unique<Buffer>(bytes);
        const int64_t slices = ceil_div(depth, kDepth);
        // Few rows are packed sooner than another thread wakes up.
        const auto is_few = [few](const RowBlock& block) { return block.rows <= few; };
        if (std::all_of(blocks_.begin(), blocks_.end(), is_few)) threads = 1;
        for_each_item(threads, static_cast<int64_t>(blocks_.size()) * slices, 1, [&] {
            return [&](int64_t item) {
                const RowBlock& block = blocks_[item / slices];
                const int64_t from = item % slices * kDepth;
                if (block.rows <= few) {
                    if (from == 0 && kernels.pack_few)
                        kernels.pack_few(row(block, 0, 0), depth, block.rows, depth, packed(block, 0, 0));
                    return;
                }
                for (int64_t tile = 0; tile < block.num_tiles; ++tile)
                    kernels.pack_tile(row(block, tile, from), depth, block.tile_rows(tile), slice_depth(from),
                                      packed(block, tile, from));
            };
        });
    }

    const std::vector<RowBlock>& blocks() const { return blocks_; }
    int64_t slice_depth(int64_t from) const { return std::min(kDepth, depth_ - from); }

    const uint8_t* row(const RowBlock& block, int64_t tile, int64_t from) const {
        return x_ + bytes_of(dtype_, (block.first_row + block.tile_start(tile)) * depth_ + from);
    }
    uint8_t* packed(const RowBlock& block, int64_t tile, int64_t from) const {
        const size_t units = from * block.num_tiles + tile * padded_depth(slice_depth(from));
        return data_->at(block.packed + units * kernels_.tile_bytes);
    }

private:
    const Kernels& kernels_;
    const uint8_t* x_;
    DType dtype_;
    int64_t depth_;
    std::vector<RowBlock> blocks_;
    std::unique_ptr<Buffer> data_;
};

// Rows [row, row + rows) of a weight, of them `inputs` inputs.
struct Piece {
    const Weight& weight;
    int64_t row, rows, input, inputs;

    // The `part`-th of `parts` parts into the L2 cache. No hardware prefetcher follows short pieces of many rows, and
    // asked for all at once, they wait for each other: brought in while others are multiplied, they are there in time.
    void prefetch(int64_t part, int64_t parts) const {
        for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts; ++r) {
            gptoss_ft::prefetch(weight.at(row + r, input), bytes_of(weight.type, inputs) + 1);
            if (weight.scales) gptoss_ft::prefetch(weight.scale(row + r, input / kBlock), 1);
        }
    }
};

// The widest of `widest`, half of it and so on down to `narrowest` that gives every thread several strips.
int64_t strip_width(int64_t widest, int64_t narrowest, int64_t columns, const std::vector<RowBlock>& blocks,
                    int threads) {
    int64_t width = widest, most_rows = 0, count = static_cast<int64_t>(blocks.size());
    for (const RowBlock& block : blocks) most_rows = std::max(most_rows, block.rows);
    const auto too_large = [&] { return most_rows * width * static_cast<int64_t>(sizeof(float)) > kSumBytes; };
    while (width > narrowest && (too_large() || count * ceil_div(columns, width) < 4 * threads)) width /= 2;
    return width;
}

// What one thread needs to compute columns of a row block, C as [panel][rows][columns].
class Strip {
public:
    // Panels are decoded for `group` columns at a time.
    Strip(const Kernels& kernels, const PackedRows& x, int64_t group)
        : kernels_(kernels),
          x_(x),
          group_(group),
          panels_(panel_stride(kDepth) * group * sizeof(float)),
          tile_(kDepth * (kernels.exact ? kernels.exact->tile_bytes : 0)),
          sums_(kSumBytes) {}

    // Sum over `depth` in slices. `decode(kernels, first, width, from, depth, panels)` decodes columns [first, first +
    // width) of the strip and says whether those kernels could; `piece(first, from)` is what that call reads, where
    // columns after those of this strip belong to the next one.
    template <class Decode, class PieceOf>
    void multiply(const RowBlock& block, int64_t depth, int64_t width, const Decode& decode, const PieceOf& piece) {
        for (int64_t from = 0; from < depth; from += kDepth)
            for (int64_t first = 0; first < width; first += group_) {
                const bool last = first + group_ >= width, end = last && from + kDepth >= depth;
                const Piece ahead = piece(last && !end ? 0 : first + group_, end ? 0 : last ? from + kDepth : from);
                multiply_group(block, first, std::min(group_, width - first), from, depth, decode, ahead);
            }
    }

    float* sums(const RowBlock& block, int64_t panel) const {
        return sums_.at<float>() + panel * block.rows * kernels_.columns;
    }

private:
    template <class Decode>
    void multiply_group(const RowBlock& block, int64_t first, int64_t width, int64_t from, int64_t depth,
                        const Decode& decode, const Piece& ahead) {
        const int64_t slice = x_.slice_depth(from), num_panels = ceil_div(width, kernels_.columns);
        const Kernels* kernels = &kernels_;
        if (!decode(*kernels, first, width, from, slice, panels_.at())) {
            kernels = kernels_.exact;
            decode(*kernels, first, width, from, slice, panels_.at());
        }
        for (int64_t panel = 0; panel < num_panels; ++panel)
            for (int64_t tile = 0; tile < block.num_tiles; ++tile) {
                const int64_t rows = block.tile_rows(tile);
                const uint8_t* packed = x_.packed(block, tile, from);
                if (kernels != &kernels_) {
                    kernels->pack_tile(x_.row(block, tile, from), depth, rows, slice, tile_.at());
                    packed = tile_.at();
                }
                float* c = sums(block, first / kernels->columns + panel) + block.tile_start(tile) * kernels->columns;
                const uint8_t* decoded = panels_.at(panel * panel_stride(slice) * kernels->panel_bytes);
                kernels->multiply(rows, packed, decoded, slice, c, from > 0);
                ahead.prefetch(panel * block.num_tiles + tile, num_panels * block.num_tiles);
            }
    }

    const Kernels& kernels_;
    const PackedRows& x_;
    int64_t group_;
    Buffer panels_, tile_, sums_;
};

// Round C, laid out as in a Strip, to columns [column, column + width) of `y`, which has `stride` columns.
void store(const Kernels& kernels, const RowBlock& block, const float* sums, const float* bias, int64_t column,
           int64_t width, DType dtype, void* y, int64_t stride) {
    for (int64_t first = 0; first < width; first += kernels.columns) {
        const int64_t count = std::min<int64_t>(kernels.columns, width - first);
        void* out = static_cast<uint8_t*>(y) + bytes_of(dtype, block.first_row * stride + column + first);
        kernels.store(sums + first * block.rows, block.rows, count, bias ? bias + first : nullptr, out, stride);
    }
}

}  // namespace

void grouped_linear(const Kernels& kernels, int threads, const Experts& experts, DType dtype, const void* x,
                    const void* bias, DType bias_dtype, void* y) {
    const PackedRows rows(kernels, threads, experts, dtype, x, experts.in, kFewRows);
    const int64_t num_blocks = static_cast<int64_t>(rows.blocks().size());
    const int64_t widest = strip_width(kForwardWidth, kBlock, experts.out, rows.blocks(), threads);
    const int64_t num_strips = ceil_div(experts.out, widest);
    for_each_item(threads, num_blocks * num_strips, 1, [&] {
        // Its scratch is fresh memory, which costs more than few rows do.
        return [&, strip = std::optional<Strip>()](int64_t item) mutable {
            const RowBlock& block = rows.blocks()[item / num_strips];
            const Weight weight = experts.weight(block.expert);
            const int64_t column = item % num_strips * widest, width = std::min(widest, experts.out - column);
            float bias_strip[kForwardWidth];
            if (bias) load_floats(bias, bias_dtype, block.expert * experts.out + column, width, bias_strip);
            const float* add = bias ? bias_strip : nullptr;
            if (block.rows <= kFewRows) {
                const uint8_t* few = kernels.pack_few ? rows.packed(block, 0, 0) : rows.row(block, 0, 0);
                alignas(64) float sums[kFewRows * kForwardWidth];
                for (int64_t n = 0; n < width; n += kernels.columns)
                    kernels.forward_few(few, experts.in, block.rows, weight, column + n, sums + n * block.rows);
                store(kernels, block, sums, add, column, width, dtype, y, experts.out);
                return;
            }
            const auto decode = [&](const Kernels& k, int64_t first, int64_t, int64_t from, int64_t depth,
                                    void* panel) { return k.pack_forward(weight, column + first, from, depth, panel); };
            const auto piece = [&](int64_t first, int64_t from) -> Piece {
                return {weight, column + first, kernels.columns, from, rows.slice_depth(from)};
            };
            if (!strip) strip.emplace(kernels, rows, kernels.columns);
            strip->multiply(block, experts.in, width, decode, piece);
            store(kernels, block, strip->sums(block, 0), add, column, width, dtype, y, experts.out);
        };
    });
}

void grouped_linear_dx(const Kernels& kernels, int threads, const Experts& experts, DType dtype, const void* dy,
                       void* dx) {
    const PackedRows rows(kernels, threads, experts, dtype, dy, experts.out, 0);
    const int64_t num_blocks = static_cast<int64_t>(rows.blocks().size());
    const int64_t widest = strip_width(kDxWidth, 2 * kBlock, experts.in, rows.blocks(), threads);
    const int64_t num_strips = ceil_div(experts.in, widest);
    const int64_t column_bytes = kDepth * static_cast<int64_t>(kernels.panel_bytes) / kernels.columns;
    const int64_t group = std::min(widest, kDxGroupBytes / column_bytes);
    for_each_item(threads, num_blocks * num_strips, 1, [&] {
        return [&, strip = Strip(kernels, rows, group)](int64_t item) mutable {
            const RowBlock& block = rows.blocks()[item / num_strips];
            const Weight weight = experts.weight(block.expert);
            const int64_t column = item % num_strips * widest, width = std::min(widest, experts.in - column);
            const auto decode = [&](const Kernels& k, int64_t first, int64_t count, int64_t from, int64_t depth,
                                    void* panels) {
                return k.pack_dx(weight, from, depth, column + first, count, panels);
            };
            const auto piece = [&](int64_t first, int64_t from) -> Piece {
                const int64_t input = column + first;
                return {weight, from, rows.slice_depth(from), input, std::clamp<int64_t>(experts.in - input, 0, group)};
            };
            strip.multiply(block, experts.out, width, decode, piece);
            store(kernels, block, strip.sums(block, 0), nullptr, column, width, dtype, dx, experts.in);
        };
    });
}

}  // namespace gptoss_ft
