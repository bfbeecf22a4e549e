// Independent pieces of work on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace sd {

// Calls work(0) ... work(n - 1), each once, on up to `threads` threads, in any order. The first exception
// stops what has not begun and is rethrown.
template <typename Work>
void parallel_for(int threads, size_t n, const Work & work) {
    std::atomic<size_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    const auto run = [&] {
        for (size_t i = next++; i < n; i = next++) {
            try {
                work(i);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(guard);
                failure = failure ? failure : std::current_exception();
                next = n;
            }
        }
    };
    std::vector<std::thread> others;
    const size_t wanted = std::min(n, static_cast<size_t>(std::max(threads, 1)));
    try {
        while (others.size() + 1 < wanted) {
            others.emplace_back(run);
        }
    } catch (const std::exception &) {
        // The system gives no more threads, or no memory for them: those that there are do the work.
    }
    run();
    for (std::thread & other : others) {
        other.join();
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
}

} // namespace sd
