// One body on several threads.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace gptoss_ft {

// Call `body()` on each of `threads` threads. With OpenMP these are torch's own threads: its libgomp is loaded with
// global symbols, so GOMP_parallel binds to it, and no second pool competes for the cores.
template <class Body>
void on_threads(int threads, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    body();
#else
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(body);
    body();
    for (auto& other : others) other.join();
#endif
}

// Call `worker(item)` for every item in [0, count), handed out in runs of `grain` as threads become free. Each thread
// has its own worker, from `make_worker`.
template <class MakeWorker>
void for_each_item(int threads, int64_t count, int64_t grain, const MakeWorker& make_worker) {
    const int64_t runs = (count + grain - 1) / grain;
    if (runs == 0) return;
    std::atomic<int64_t> next{0};
    on_threads(runs < threads ? static_cast<int>(runs) : threads, [&] {
        auto worker = make_worker();
        for (int64_t run; (run = next.fetch_add(1, std::memory_order_relaxed)) < runs;)
            for (int64_t item = run * grain; item < count && item < (run + 1) * grain; ++item) worker(item);
    });
}

}  // namespace gptoss_ft
