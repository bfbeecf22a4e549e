// Where weights live and graphs run: a device of ggml's registry, and the CPU for what it lacks.
#pragma once

#include "kernels/pool.h"
#include "kernels/set.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

struct ggml_backend;
struct ggml_backend_device;

namespace sd {

struct DeviceInfo {
    std::string name, description;
    size_t      memory_free, memory_total; // bytes
    bool        is_cpu;
};

// Every device that the loaded ggml offers.
std::vector<DeviceInfo> devices();

// Adds the devices of an RPC server ("host:port"). Throws where ggml was built without that backend.
void add_rpc_devices(const std::string & endpoint);

// Version, commit and CPU features of the loaded ggml, a "key: value" a line.
std::string ggml_info();

// The kernels that graphs run on by default, and what precision "auto" stands for, a "key: value" a line.
std::string kernels_info();

class Device {
  public:
    // `name` as devices() lists it, in any case of letters; "" takes the best. `threads` 0: one per core. `precision` of
    // products on the CPU: "f32", "bf16", or "auto" (""): bf16 where the processor multiplies it natively.
    Device(const std::string & name, int threads, const std::string & precision);
    ~Device();
    Device(const Device &) = delete;
    Device & operator=(const Device &) = delete;

    const std::string & name() const { return name_; }
    int                 threads() const { return threads_; }
    bool                is_cpu() const { return backends_.size() == 1; }
    bool                reads_host_memory() const { return is_cpu(); }

    // The kernels that graphs run on; null: ggml's own operations.
    const KernelSet * kernels() const { return kernels_; }
    Pool &            pool() const { return *pool_; }
    const char *      kernels_name() const { return kernels_ ? kernels_->name : "reference"; }
    const char *      precision() const { return kernels_ && kernels_->bf16 ? "bf16" : "f32"; }

    // Bytes that are free; 0 where the device does not tell.
    size_t memory_free() const;
    // The same where the CPU's counts what the system could give back, and the largest size_t where nobody tells.
    size_t memory_left() const;

    // The device, then the CPU where that is another.
    const std::vector<ggml_backend *> & backends() const { return backends_; }

    // Called now and then while a graph computes on the CPU; false stops it. Empty: never asked.
    void set_keep_going(std::function<bool()> keep_going);
    bool keep_going() const { return !keep_going_ || keep_going_(); }

  private:
    static bool should_abort(void * self);

    std::string                 name_;
    int                         threads_;
    std::vector<ggml_backend *> backends_;
    std::function<bool()>       keep_going_;
    const KernelSet *           kernels_ = nullptr;
    std::unique_ptr<Pool>       pool_; // where there are kernels
};

} // namespace sd
