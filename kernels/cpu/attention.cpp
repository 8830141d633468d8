#include "attention.h"

#include <memory>

#include "parallel.h"

namespace gptoss_ft {
namespace {

struct alignas(64) CacheLine {
    unsigned char bytes[64];
};

// `run(item, scratch)` for every item, with `bytes` of scratch for each thread. All scratch is allocated here, where
// running out of memory can be reported.
template <class Run>
void for_each_with_scratch(int threads, int64_t count, size_t bytes, const Run& run) {
    const size_t lines = bytes / sizeof(CacheLine) + 1;
    threads = static_cast<int>(std::min<int64_t>(threads, count));
    const std::unique_ptr<CacheLine[]> scratch(new CacheLine[lines * threads]);
    std::atomic<size_t> taken{0};
    for_each_item(threads, count, 1, [&] {
        CacheLine* own = scratch.get() + lines * taken.fetch_add(1, std::memory_order_relaxed);
        return [own, &run](int64_t item) { run(item, own); };
    });
}

}  // namespace

void attention_forward(const AttentionKernels& kernels, int threads, const Attention& attention) {
    const int64_t count = attention.kv_items() * attention.blocks(kForwardRows);
    // Later tokens see more keys: the longest items come first.
    for_each_with_scratch(threads, count, kernels.forward_bytes(attention), [&](int64_t item, void* scratch) {
        kernels.forward(attention, count - 1 - item, scratch);
    });
}

void attention_backward(const AttentionKernels& kernels, int threads, const Attention& attention) {
    for_each_item(threads, attention.batch * attention.query_heads, 1, [&] {
        return [&](int64_t item) { kernels.prepare(attention, item); };
    });
    const std::unique_ptr<Turn[]> turns(new Turn[attention.kv_items() * attention.blocks(kBackwardRows)]());
    const int64_t count = attention.kv_items() * attention.key_blocks();
    for_each_with_scratch(threads, count, kernels.backward_bytes(attention), [&](int64_t item, void* scratch) {
        kernels.backward(attention, item, turns.get(), scratch);
    });
}

}  // namespace gptoss_ft
