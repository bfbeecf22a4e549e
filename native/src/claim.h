// One call at a time.
#pragma once

#include "context.h"
#include "core/error.h"

#include <chrono>
#include <functional>
#include <utility>

namespace sd {

// A context is used by one thread at a time, with the files that it opened, and asks its caller now and then whether
// to go on.
class Claim {
  public:
    Claim(Context & context, std::function<bool()> keep_going) : context_(context) {
        context_.weights_.checkpoint().verify_unchanged(
            "the model was open; open it again, with base_copy 'ram' if it may change once more");
        std::function<bool()> ask;
        if (keep_going) {
            using Clock = std::chrono::steady_clock;
            ask = [keep_going, asked = Clock::now()]() mutable {
                const auto now = Clock::now();
                if (now - asked < std::chrono::milliseconds(100)) {
                    return true;
                }
                asked = now;
                return keep_going();
            };
        }
        if (context_.busy_.exchange(true)) {
            fail(Status::busy, "this context is in use by another thread; wait for it, or open a second one");
        }
        context_.device_.set_keep_going(std::move(ask)); // nothing throws from here on, or the context would stay busy
    }
    ~Claim() {
        context_.runner_.release(); // between calls there are weights in memory, and no activations
        context_.device_.set_keep_going({});
        context_.busy_ = false;
    }
    Claim(const Claim &) = delete;
    Claim & operator=(const Claim &) = delete;

  private:
    Context & context_;
};

} // namespace sd
