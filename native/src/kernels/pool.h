// The threads that kernels run on. ggml's own wait for each other by spinning, operation by operation, and slow each
// other down many times where other work holds a core; these take the next piece of work when they are ready for it,
// and sleep when none comes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace sd {

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool &) = delete;
    Pool & operator=(const Pool &) = delete;

    int threads() const;

    using Work = std::function<void(int64_t piece, int thread)>;

    // Calls `work` for every piece in [0, pieces), in any order, and returns when all are done. Threads are numbered
    // from 0, which is the caller. `work` must not throw. `operations` is about how many additions and multiplications
    // it is in all: what is done before another thread is awake is done by the caller alone.
    void run(int64_t pieces, double operations, const Work & work);

    // Memory of one thread, aligned for any vector, kept from call to call: what was in it is undefined. Throws
    // Error(out_of_memory).
    void * scratch(int thread, size_t bytes);

    // Makes sure beforehand that scratch() of every thread has them.
    void reserve(size_t bytes);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

} // namespace sd
