// Sink attention for any vector width. Included by each attention_*.cpp, inside a namespace of its own, after it has
// defined
//   TARGET        the function attribute that enables its instructions
//   WIDTH         fp32 lanes of a vector
//   TILE_ROWS     rows of a tile: 2 * TILE_ROWS accumulators, two columns and one value must fit the registers
//   WORD_VALUES   1: products in fp32; 2: products of bf16 pairs, and the file defines `add_product` afterwards
// Softmax runs on base-2 logarithms, in fp32. Sums of products are fp32 too.
#include "vectors.h"

#include "attention_product.h"

#include "attention_sight.h"

#include "attention_forward.h"

#include "attention_backward.h"

template <class T>
constexpr AttentionKernels kernels() {
    return {forward_bytes, forward<T>, prepare<T>, backward_bytes, backward<T>};
}
