#include "kernels/pool.h"

#include "core/error.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace sd {
namespace {

constexpr int    spins = 2000; // some 20 microseconds: less than a small operation takes, more than the gap between two
constexpr double worth_waking = 2e6; // some 10 microseconds of a core
constexpr size_t alignment = 64;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
}

struct Free {
    void operator()(void * memory) const { std::free(memory); }
};

struct Scratch {
    std::unique_ptr<void, Free> memory;
    size_t                      bytes = 0;
};

} // namespace

struct Pool::State {
    std::vector<std::thread> threads;
    std::vector<Scratch>     scratches;

    // One job at a time, which workers may join while it is open. The caller does not wait for a worker that the system
    // has not woken, only for those that joined; both flags are sequentially consistent, so that either the worker sees
    // the job closed or the caller sees the worker.
    const Work *          work = nullptr;
    int64_t               pieces = 0;
    std::atomic<int64_t>  next{0};
    std::atomic<bool>     open{false};
    std::atomic<int>      joined{0};
    std::atomic<uint64_t> generation{0};
    bool                  end = false;

    std::mutex              mutex;
    std::condition_variable begun, left;

    void take_part(int thread) {
        for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
            (*work)(piece, thread);
        }
    }

    void serve(int thread) {
        for (uint64_t seen = 0;;) {
            for (int i = 0; i < spins && generation.load(std::memory_order_acquire) == seen; ++i) {
                pause();
            }
            if (generation.load(std::memory_order_acquire) == seen) {
                std::unique_lock lock(mutex);
                begun.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
            }
            seen = generation.load(std::memory_order_acquire);
            if (end) {
                return;
            }
            joined.fetch_add(1);
            if (open.load()) {
                take_part(thread);
            }
            if (joined.fetch_sub(1) == 1 && !open.load()) {
                const std::lock_guard lock(mutex);
                left.notify_one();
            }
        }
    }

    void begin() {
        {
            const std::lock_guard lock(mutex);
            generation.fetch_add(1, std::memory_order_release);
        }
        begun.notify_all();
    }
};

Pool::Pool(int threads) : state_(std::make_unique<State>()) {
    state_->scratches.resize(static_cast<size_t>(threads));
    for (int thread = 1; thread < threads; ++thread) {
        state_->threads.emplace_back([state = state_.get(), thread] { state->serve(thread); });
    }
}

Pool::~Pool() {
    state_->end = true;
    state_->begin();
    for (std::thread & thread : state_->threads) {
        thread.join();
    }
}

int Pool::threads() const { return static_cast<int>(state_->scratches.size()); }

void Pool::run(int64_t pieces, double operations, const Work & work) {
    State & s = *state_;
    if (pieces <= 1 || s.threads.empty() || operations < worth_waking) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
            work(piece, 0);
        }
        return;
    }
    s.work = &work;
    s.pieces = pieces;
    s.next.store(0, std::memory_order_relaxed);
    s.open.store(true);
    s.begin();
    s.take_part(0);
    s.open.store(false);
    for (int i = 0; i < spins && s.joined.load() > 0; ++i) {
        pause();
    }
    if (s.joined.load() > 0) {
        std::unique_lock lock(s.mutex);
        s.left.wait(lock, [&] { return s.joined.load() == 0; });
    }
}

void * Pool::scratch(int thread, size_t bytes) {
    Scratch & own = state_->scratches[static_cast<size_t>(thread)];
    if (own.bytes < bytes) {
        own.memory.reset();
        own.bytes = (bytes + alignment - 1) / alignment * alignment;
        own.memory.reset(std::aligned_alloc(alignment, own.bytes));
        if (!own.memory) {
            own.bytes = 0;
            fail(Status::out_of_memory, "%zu MB of scratch memory for a CPU kernel could not be had", bytes >> 20);
        }
    }
    return own.memory.get();
}

void Pool::reserve(size_t bytes) {
    for (int thread = 0; thread < threads(); ++thread) {
        scratch(thread, bytes);
    }
}

} // namespace sd
