// A layer of gpt-oss for the few tokens of a step of generation.
#pragma once

#include <cstdint>

#include "attention.h"
#include "mixture.h"

namespace gptoss_ft {

// Parameters and constants. Weights are row-major; those of one kind share a type.
// The Python declaration of this struct is in kernels/cpu_decoder_layer.py.
struct DecoderLayer {
    DType dense, dense_bias, norms, sinks_dtype, expert_bias;
    int32_t choices;  // experts of a token
    int64_t hidden, intermediate, num_experts, query_heads, kv_heads, head_dim;
    int64_t window;  // keys that a query sees at most, its own included; 0: all
    float input_epsilon, epsilon, scaling, alpha, limit;
    const void* input_norm;  // [hidden]
    const uint8_t *query, *key, *value;  // [heads * head_dim, hidden]
    const void *query_bias, *key_bias, *value_bias;
    const void* sinks;  // [query_heads]
    const uint8_t* projection;  // [hidden, query_heads * head_dim]
    const void* projection_bias;
    const void* norm;  // [hidden]
    const uint8_t* router;  // [num_experts, hidden]
    const void* router_bias;
    const uint8_t *gate_up, *gate_up_scales;  // MXFP4 [num_experts, 2 * intermediate, hidden]
    const void* gate_up_bias;
    const uint8_t *down, *down_scales;  // MXFP4 [num_experts, hidden, intermediate]
    const void* down_bias;
};

// The tokens, and the keys and values of which theirs are the last.
struct Step {
    const void* x;  // [batch, queries, hidden]
    int64_t batch, queries, keys;
    const void *cos, *sin;  // [rotations, head_dim / 2]; of every token, or of each of a row, the same in all rows
    int64_t rotations;
    View k, v;                 // of the type of x; places of the tokens are written, and then all are read
    const int32_t* documents;  // [batch, keys] or null, as in Attention
    void* out;                 // [batch, queries, hidden]
};

struct LayerKernels {
    const Kernels &dense, &packed;
    const ExpertKernels& elementwise;
    const AttentionKernels& attention;
};

// y = x + attention(rms_norm(x)) P^T + p, and out = y + mixture(n) with n = rms_norm(y), in which a token's experts are
// those of the highest logits n R^T + r, weighted by the softmax of these. Everything is rounded to `dtype` where
// separate operations would round it, but queries and keys only after their rotation.
void decoder_layer(int isa, const LayerKernels&, int threads, const DecoderLayer&, DType dtype, const Step&);

}  // namespace gptoss_ft
