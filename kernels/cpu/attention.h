// Causal grouped-query attention with a sink: one logit per query head that takes part in the softmax and has no value.
//
// Rows are processed in blocks of consecutive tokens. All `group` query heads that share a key/value head are rows of
// the same block, in the order [token][head], so keys and values are read once for all of them and neighbouring rows see
// nearly the same keys. A block of rows meets the keys kKeys at a time; no more of the [queries, keys] scores exists.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "weight.h"

namespace gptoss_ft {

// A multiple of every panel's width. With 96, K, V, their transposes and gradients take 150 KB at a head dimension of
// 64, and adding a block's product to its sums costs 2 % of computing it.
constexpr int64_t kKeys = 96;
// Repacking keys and values for every block of rows costs about 1 % with this many rows.
constexpr int64_t kForwardRows = 384;
// The backward pass holds [rows, kKeys] scores and their gradients.
constexpr int64_t kBackwardRows = 96;

// [batch, head, token, head_dim] at any strides, in elements; head_dim is contiguous.
struct View {
    void* data;
    int64_t batch, head, token;
};

// The Python declaration of this struct is in kernels/cpu_attention.py.
struct Attention {
    int64_t batch, query_heads, kv_heads, queries, keys, head_dim;
    int64_t window;            // keys that a query sees at most, its own included
    const int32_t* documents;  // [batch, keys] or null for one document; a negative one sees nothing and is not seen
    // [batch, keys], both null unless documents are trees in depth-first order. A token is out of sight from the place
    // `visible_until` on, and for those that are `reach` or more levels deeper; `window` is then all keys.
    const int32_t* depths;
    const int32_t* visible_until;
    int64_t reach;
    const float* sinks;        // [query_heads]
    float* lse;                // [batch, query_heads, queries]: logarithm of the softmax's denominator
    View q, k, v, out;
    View d_out, dk, dv;
    float* dq;                 // [batch, query_heads, queries, head_dim], zeros
    float* delta;              // [batch, query_heads, queries]: scratch
    float* dsinks;             // [batch, query_heads]
    float scaling;             // above zero

    int64_t group() const { return query_heads / kv_heads; }
    // The last queries of all keys are the queries' own.
    int64_t position(int64_t token) const { return keys - queries + token; }
    int64_t block_tokens(int64_t rows) const { return std::min(queries, std::max<int64_t>(1, rows / group())); }
    int64_t blocks(int64_t rows) const { return (queries + block_tokens(rows) - 1) / block_tokens(rows); }
    int64_t key_blocks() const { return (keys + kKeys - 1) / kKeys; }
    int64_t kv_items() const { return batch * kv_heads; }
};

// How many key blocks have added to the dq of a block of rows. They add in order, which makes sums independent of the
// number of threads; items are handed out in the same order, so the block waited for is always under way.
using Turn = std::atomic<int32_t>;

struct AttentionKernels {
    // `item` is a block of kForwardRows rows; writes out and lse.
    size_t (*forward_bytes)(const Attention&);
    void (*forward)(const Attention&, int64_t item, void* scratch);
    // `item` is a (batch, query head); writes delta and dsinks.
    void (*prepare)(const Attention&, int64_t item);
    // `item` is a block of keys; writes dk and dv and adds to dq. `turns` is [batch * kv_heads, blocks(kBackwardRows)].
    size_t (*backward_bytes)(const Attention&);
    void (*backward)(const Attention&, int64_t item, Turn* turns, void* scratch);
};

const AttentionKernels& portable_attention(DType);
#ifdef GPTOSS_FT_X86
const AttentionKernels& avx2_attention(DType);
const AttentionKernels& avx512_attention(DType);
#endif

void attention_forward(const AttentionKernels&, int threads, const Attention&);
void attention_backward(const AttentionKernels&, int threads, const Attention&);

}  // namespace gptoss_ft
