// The handle as Python holds it. What each subject offers of it stands in a file of its own.
#pragma once

#include "crossing.h"

#include <map>
#include <memory>

namespace binding {

// pybind11 can't hold an incomplete type, so the handle travels in this. A call in another thread keeps the
// model alive until it is through.
class Context {
  public:
    Context(const std::string & model, const std::map<std::string, std::string> & components,
            const std::string & data_dir, const Name & backend, int threads, const Name & precision, const Name & prediction,
            const Name & lora_mode, const Name & base_copy, bool requantise, bool strict_loras,
            size_t lora_cache, std::optional<bool> zero_snr, size_t memory_limit);

    void close() { handle_.reset(); }
    bool closed() const { return !handle_; }
    std::shared_ptr<sd_ctx> handle() const; // raises where it is closed

    // What a log handler raised, until the call that made it log is through.
    Raised & while_logging() const { return *while_logging_; }

  private:
    std::shared_ptr<Raised> while_logging_ = std::make_shared<Raised>();
    std::shared_ptr<sd_ctx> handle_;
};

using ContextClass = py::class_<Context>;

ContextClass bind_context(py::module_ & m);
void bind_generate(py::module_ & m, ContextClass & context);
void bind_loras(ContextClass & context);
void bind_weights(py::module_ & m);
void bind_lora_files(py::module_ & m);
void bind_probe(py::module_ & m);

} // namespace binding
