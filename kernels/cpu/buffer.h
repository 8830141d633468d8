// Scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace gptoss_ft {

// At least `bytes` bytes in cache lines of their own, not initialised; throws std::bad_alloc.
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

}  // namespace gptoss_ft
