// What one instruction set offers: the inner pieces from which grouped.cpp builds whole products.
//
// A product C = A * B is made panel by panel. A panel is `columns` columns of B and at most `kDepth` of its rows,
// decoded from MXFP4 or copied from dense weights into whatever order `multiply` likes best. A is cut into tiles of at
// most `tile_rows` rows, packed once for all panels. Tiles and panels have room for a depth rounded up to kDepthStep,
// and kernels that compute with that room fill it with zeros. The order of additions for one element of C depends on
// kDepth alone: neither the number of threads nor, above kFewRows, that of rows changes a bit of it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight.h"

namespace gptoss_ft {

// 256 deep, a panel of 32 bf16 columns is 16 KB and a tile of A 8 KB, which together stay in a 32 KB L1 cache. Kept in
// L2 whole, the panels made the same inner loop 3-4 % slower (Zen 4).
constexpr int64_t kDepth = 256;
constexpr int64_t kDepthStep = 8;
constexpr int64_t kFewRows = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded_depth(int64_t depth) { return ceil_div(depth, kDepthStep) * kDepthStep; }
// Of consecutive panels, in units of depth. One more than needed: at multiples of 16 KB, what pack_dx writes for one
// weight row fell on one set of the L1 cache.
inline int64_t panel_stride(int64_t depth) { return padded_depth(depth) + 1; }

struct Kernels {
    int columns;            // a divisor of kBlock
    int tile_rows;
    size_t tile_bytes;      // of one packed tile, for every unit of depth
    size_t panel_bytes;     // of one panel, for every unit of depth

    // Reorder `rows` x `depth` activations of row stride `stride` (elements) into a tile.
    void (*pack_tile)(const void* x, int64_t stride, int64_t rows, int64_t depth, void* tile);

    // Make a panel for Y = X W^T: columns are weight rows [row, row + columns), depth is inputs [input, input + depth).
    // Columns beyond the last weight row hold anything. False: a scale in there is out of the range of these kernels
    // and `exact` must be used.
    bool (*pack_forward)(const Weight&, int64_t row, int64_t input, int64_t depth, void* panel);

    // Make panels panel_stride(depth) apart for dX = dY W: columns are inputs [input, input + width), depth is weight
    // rows. Columns beyond `width` hold anything.
    bool (*pack_dx)(const Weight&, int64_t row, int64_t depth, int64_t input, int64_t width, void* panels);

    // C[rows, columns] = tile * panel, or += if `accumulate`.
    void (*multiply)(int64_t rows, const void* tile, const void* panel, int64_t depth, float* c, bool accumulate);

    // The first `count` columns of y[rows, columns] = C + bias, rounded to y's type; a null bias is zero.
    void (*store)(const float* c, int64_t rows, int64_t count, const float* bias, void* y, int64_t stride);

    // C[rows, columns] of Y = X W^T for at most kFewRows rows, with nothing transposed.
    void (*forward_few)(const void* x, int64_t stride, int64_t rows, const Weight&, int64_t row, float* c);

    // What forward_few wants instead of x, in the room of a tile. Null: x itself.
    void (*pack_few)(const void* x, int64_t stride, int64_t rows, int64_t depth, void* packed);

    // Same columns and tile_rows in fp32, for scales that overflow or vanish in these kernels. Null: never needed.
    const Kernels* exact;

    // MXFP4 to the type of activations.
    void (*decode)(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, void* out);
};

enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512Bf16 = 2 };

const Kernels& portable_kernels(DType activations, DType weights);
#ifdef GPTOSS_FT_X86
const Kernels& avx2_kernels(DType activations, DType weights);
const Kernels& avx512_kernels(DType activations, DType weights);
#endif

}  // namespace gptoss_ft
