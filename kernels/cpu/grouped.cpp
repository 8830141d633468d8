#include "grouped.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "parallel.h"

namespace gptoss_ft {
namespace {

// The sums of this many rows stay in the L2 cache, and decoding again for every further 512 costs about one per cent.
constexpr int64_t kRowBlock = 512;
// dX needs a piece of every weight row, here 128 bytes. With 64, one cache line, decoding took 2 cycles more for 32
// weights, because memory is then read in smaller pieces.
constexpr int64_t kDxWidth = 8 * kBlock;

class Buffer {
public:
    explicit Buffer(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 64) / 64 * 64)) {
        if (!data_) throw std::bad_alloc();
    }
    template <class T = uint8_t>
    T* at(size_t offset = 0) const { return reinterpret_cast<T*>(static_cast<uint8_t*>(data_.get()) + offset); }

private:
    struct Free {
        void operator()(void* data) const { std::free(data); }
    };
    std::unique_ptr<void, Free> data_;
};

// Consecutive rows of one expert, at most kRowBlock, cut into tiles of nearly equal height.
struct RowBlock {
    int64_t expert, first_row, rows, num_tiles;
    size_t packed;  // offset of its tiles

    int64_t tile_start(int64_t tile) const { return tile * rows / num_tiles; }
    int64_t tile_rows(int64_t tile) const { return tile_start(tile + 1) - tile_start(tile); }
};

// All activations in the order in which they are multiplied: [row block][depth / kDepth][tile][kDepth]. Row blocks of
// at most `unpacked_rows` rows are left out.
class PackedRows {
public:
    PackedRows(const Kernels& kernels, int threads, const Experts& experts, DType dtype, const void* x, int64_t depth,
               int64_t unpacked_rows)
        : kernels_(kernels), x_(static_cast<const uint8_t*>(x)), dtype_(dtype), depth_(depth) {
        size_t bytes = 0;
        for (int64_t e = 0, start = 0; e < experts.num_experts; start = experts.ends[e++]) {
            const int64_t rows = experts.ends[e] - start, parts = ceil_div(rows, kRowBlock);
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t first = part * rows / parts, count = (part + 1) * rows / parts - first;
                blocks_.push_back({e, start + first, count, ceil_div(count, kernels.tile_rows), bytes});
                if (count > unpacked_rows) bytes += blocks_.back().num_tiles * padded_depth(depth) * kernels.tile_bytes;
            }
        }
        data_ = std::make_unique<Buffer>(bytes);
        const int64_t slices = ceil_div(depth, kDepth);
        for_each_item(threads, static_cast<int64_t>(blocks_.size()) * slices, 1, [&] {
            return [&](int64_t item) {
                const RowBlock& block = blocks_[item / slices];
                const int64_t from = item % slices * kDepth;
                for (int64_t tile = 0; tile < block.num_tiles && block.rows > unpacked_rows; ++tile)
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

// What one thread needs to compute `width` columns of a row block, C as [panel][rows][columns].
class Strip {
public:
    Strip(const Kernels& kernels, const PackedRows& x, int64_t width)
        : kernels_(kernels),
          x_(x),
          panels_(kDepth * width * sizeof(float)),
          tile_(kDepth * (kernels.exact ? kernels.exact->tile_bytes : 0)),
          sums_(kRowBlock * width * sizeof(float)) {}

    // Sum over `depth` in slices; `decode(kernels, from, depth, panels)` says whether those kernels could.
    template <class Decode>
    void multiply(const RowBlock& block, int64_t depth, int64_t width, const Decode& decode) {
        for (int64_t from = 0; from < depth; from += kDepth) {
            const int64_t slice = x_.slice_depth(from);
            const Kernels* kernels = &kernels_;
            if (!decode(*kernels, from, slice, panels_.at())) {
                kernels = kernels_.exact;
                decode(*kernels, from, slice, panels_.at());
            }
            for (int64_t panel = 0; panel < ceil_div(width, kernels->columns); ++panel)
                for (int64_t tile = 0; tile < block.num_tiles; ++tile) {
                    const int64_t rows = block.tile_rows(tile);
                    const uint8_t* packed = x_.packed(block, tile, from);
                    if (kernels != &kernels_) {
                        kernels->pack_tile(x_.row(block, tile, from), depth, rows, slice, tile_.at());
                        packed = tile_.at();
                    }
                    kernels->multiply(rows, packed, panels_.at(panel * padded_depth(slice) * kernels->panel_bytes), slice,
                                      sums(block, panel) + block.tile_start(tile) * kernels->columns, from > 0);
                }
        }
    }

    float* sums(const RowBlock& block, int64_t panel) const {
        return sums_.at<float>() + panel * block.rows * kernels_.columns;
    }

    // Round the sums to columns [column, column + width) of `y`, which has `stride` columns.
    void store(const RowBlock& block, const float* bias, int64_t column, int64_t width, DType dtype, void* y,
               int64_t stride) const {
        for (int64_t first = 0; first < width; first += kernels_.columns) {
            const int64_t count = std::min<int64_t>(kernels_.columns, width - first);
            void* out = static_cast<uint8_t*>(y) + bytes_of(dtype, block.first_row * stride + column + first);
            kernels_.store(sums(block, first / kernels_.columns), block.rows, count, bias ? bias + first : nullptr, out,
                           stride);
        }
    }

private:
    const Kernels& kernels_;
    const PackedRows& x_;
    Buffer panels_, tile_, sums_;
};

Weight weight_of(const Experts& experts, int64_t expert) {
    const int64_t size = experts.out * experts.in;
    const uint8_t* scales = experts.scales ? experts.scales + expert * size / kBlock : nullptr;
    return {experts.type, experts.data + bytes_of(experts.type, expert * size), scales, experts.out, experts.in};
}

void load_bias(const void* bias, DType dtype, int64_t first, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i)
        out[i] = dtype == kBFloat16 ? float_from_bf16(static_cast<const uint16_t*>(bias)[first + i])
                                    : static_cast<const float*>(bias)[first + i];
}

}  // namespace

void grouped_linear(const Kernels& kernels, int threads, const Experts& experts, DType dtype, const void* x,
                    const void* bias, DType bias_dtype, void* y) {
    const int64_t few_rows = kernels.forward_few ? kFewRows : 0;
    const PackedRows rows(kernels, threads, experts, dtype, x, experts.in, few_rows);
    const int64_t num_strips = ceil_div(experts.out, kBlock);
    // Four neighbouring strips to a thread: each prefetches for the next.
    for_each_item(threads, static_cast<int64_t>(rows.blocks().size()) * num_strips, 4, [&] {
        return [&, strip = Strip(kernels, rows, kBlock)](int64_t item) mutable {
            const RowBlock& block = rows.blocks()[item / num_strips];
            const Weight weight = weight_of(experts, block.expert);
            const int64_t column = item % num_strips * kBlock, width = std::min(kBlock, experts.out - column);
            const auto decode = [&](const Kernels& k, int64_t from, int64_t depth, uint8_t* panels) {
                // Row blocks that forward_few refused are not packed for any kernels but the exact ones.
                if (block.rows <= few_rows && &k == &kernels) return false;
                // Weights are read in steps of 16 bytes through 32 rows, which no hardware prefetcher follows; the next
                // strip, as it lies, it does. Waiting for them here cost 4 cycles for 32 weights.
                prefetch(weight.at(column + kBlock, 0) + bytes_of(weight.type, from * kBlock), bytes_of(weight.type, depth * kBlock));
                const size_t panel_bytes = padded_depth(depth) * k.panel_bytes;
                bool in_range = true;
                for (int64_t n = 0; n < width; n += k.columns)
                    in_range &= k.pack_forward(weight, column + n, from, depth, panels + n / k.columns * panel_bytes);
                return in_range;
            };
            bool done = block.rows <= few_rows;
            for (int64_t n = 0; n < width && done; n += kernels.columns)
                done = kernels.forward_few(rows.row(block, 0, 0), experts.in, block.rows, weight, column + n,
                                           strip.sums(block, n / kernels.columns));
            if (!done) strip.multiply(block, experts.in, width, decode);
            float bias_strip[kBlock];
            if (bias) load_bias(bias, bias_dtype, block.expert * experts.out + column, width, bias_strip);
            strip.store(block, bias ? bias_strip : nullptr, column, width, dtype, y, experts.out);
        };
    });
}

void grouped_linear_dx(const Kernels& kernels, int threads, const Experts& experts, DType dtype, const void* dy,
                       void* dx) {
    const PackedRows rows(kernels, threads, experts, dtype, dy, experts.out, 0);
    const int64_t num_strips = ceil_div(experts.in, kDxWidth);
    for_each_item(threads, static_cast<int64_t>(rows.blocks().size()) * num_strips, 1, [&] {
        return [&, strip = Strip(kernels, rows, kDxWidth)](int64_t item) mutable {
            const RowBlock& block = rows.blocks()[item / num_strips];
            const Weight weight = weight_of(experts, block.expert);
            const int64_t column = item % num_strips * kDxWidth, width = std::min(kDxWidth, experts.in - column);
            const auto decode = [&](const Kernels& k, int64_t from, int64_t depth, uint8_t* panels) {
                return k.pack_dx(weight, from, depth, column, width, panels);
            };
            strip.multiply(block, experts.out, width, decode);
            strip.store(block, nullptr, column, width, dtype, dx, experts.in);
        };
    });
}

}  // namespace gptoss_ft
