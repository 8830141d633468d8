#include "few_rows.h"

#include <algorithm>

#include "buffer.h"
#include "parallel.h"

namespace gptoss_ft {
namespace {

// Weight rows that a thread reads at once. Towards the end they are fewer, because threads wait for the last one.
constexpr int64_t kStrip = 4 * kBlock, kLastStrip = kBlock;

// Inputs as the kernels want them.
class FewRows {
public:
    FewRows(const Kernels& kernels, const void* x, int64_t tokens, int64_t depth)
        : x_(x), packed_(kernels.pack_few ? padded_depth(depth) * kernels.tile_bytes : 0), is_packed_(kernels.pack_few) {
        if (is_packed_) kernels.pack_few(x, depth, tokens, depth, packed_.at());
    }
    const void* get() const { return is_packed_ ? packed_.at() : x_; }

private:
    const void* x_;
    Buffer packed_;
    bool is_packed_;
};

}  // namespace

void few_rows_linear(const Kernels& kernels, int threads, const Weight& weight, DType dtype, const void* x,
                     int64_t tokens, const void* bias, DType bias_dtype, void* y) {
    const FewRows rows(kernels, x, tokens, weight.inputs);
    const int64_t out = weight.rows, strips = std::max<int64_t>(0, out / kStrip - 2 * threads), last = strips * kStrip;
    for_each_item(threads, strips + ceil_div(out - last, kLastStrip), 1, [&] {
        return [&](int64_t item) {
            const int64_t column = item < strips ? item * kStrip : last + (item - strips) * kLastStrip;
            const int64_t end = std::min(out, column + (item < strips ? kStrip : kLastStrip));
            alignas(64) float sums[kFewRows * kBlock];
            float add[kBlock];
            for (int64_t n = column; n < end; n += kernels.columns) {
                const int64_t count = std::min<int64_t>(kernels.columns, end - n);
                kernels.forward_few(rows.get(), weight.inputs, tokens, weight, n, sums);
                if (bias) load_floats(bias, bias_dtype, n, count, add);
                kernels.store(sums, tokens, count, bias ? add : nullptr,
                              static_cast<uint8_t*>(y) + bytes_of(dtype, n), out);
            }
        };
    });
}

void attention_inputs(const Kernels& kernels, int threads, const AttentionInputs& of, DType dtype, const void* x,
                      int64_t tokens, void* y) {
    const FewRows rows(kernels, x, tokens, of.in);
    const int64_t width = of.head_dim, half = width / 2, num_heads = of.heads[0] + of.heads[1] + of.heads[2];
    for_each_item(threads, num_heads, 1, [&] {
        return [&](int64_t item) {
            int part = 0;
            int64_t first = item;  // of the projection's heads
            while (first >= of.heads[part]) first -= of.heads[part++];
            const Weight weight{of.weight_dtype, of.weights[part], nullptr, of.heads[part] * width, of.in};
            alignas(64) float sums[kFewRows * kBlock], head[kFewRows][kMaxHeadDim + kBlock];
            float add[kMaxHeadDim], cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
            load_floats(of.biases[part], of.bias_dtype, first * width, width, add);
            for (int64_t n = 0; n < width; n += kernels.columns) {
                kernels.forward_few(rows.get(), of.in, tokens, weight, first * width + n, sums);
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t i = 0; i < std::min<int64_t>(kernels.columns, width - n); ++i)
                        head[t][n + i] = sums[t * kernels.columns + i] + add[n + i];
            }
            for (int64_t t = 0; t < tokens; ++t) {
                if (part < 2) {
                    load_floats(of.cos, dtype, t * half, half, cos);
                    load_floats(of.sin, dtype, t * half, half, sin);
                    for (int64_t i = 0; i < half; ++i) {
                        const float a = head[t][i], b = head[t][half + i];
                        head[t][i] = a * cos[i] - b * sin[i];
                        head[t][half + i] = b * cos[i] + a * sin[i];
                    }
                }
                for (int64_t n = 0; n < width; n += kernels.columns)
                    kernels.store(head[t] + n, 1, std::min<int64_t>(kernels.columns, width - n), nullptr,
                                  static_cast<uint8_t*>(y) + bytes_of(dtype, (t * num_heads + item) * width + n), width);
            }
        };
    });
}

}  // namespace gptoss_ft
