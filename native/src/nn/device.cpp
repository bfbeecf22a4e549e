#include "nn/device.h"

#include "core/env.h"
#include "core/error.h"
#include "core/memory.h"
#include "kernels/sets.h"
#include "nn/processor.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <algorithm>
#include <cctype>
#include <limits>
#include <memory>
#include <thread>

namespace sd {
namespace {

std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
    return text;
}

// Backends that ggml loads at run time (GGML_BACKEND_DL) register once, before anybody asks.
void load_backends() {
    check_processor();
    static const bool done = (ggml_backend_load_all(), true);
    (void) done;
}

bool is_cpu_device(ggml_backend_dev_t device) {
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

ggml_backend_dev_t cpu_device() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!cpu) {
        fail(Status::unsupported, "ggml offers no CPU device; install another build of libggml-python");
    }
    return cpu;
}

ggml_backend_dev_t choose(const std::string & name) {
    if (name.empty()) {
        for (const auto type : {GGML_BACKEND_DEVICE_TYPE_GPU, GGML_BACKEND_DEVICE_TYPE_IGPU}) {
            if (ggml_backend_dev_t device = ggml_backend_dev_by_type(type)) {
                return device;
            }
        }
        return cpu_device();
    }
    std::string known;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (lower(ggml_backend_dev_name(device)) == lower(name)) {
            return device;
        }
        known += (known.empty() ? "" : ", ") + std::string(ggml_backend_dev_name(device));
    }
    fail(Status::bad_argument, "backend '%s' is not known; this ggml offers: %s", name.c_str(), known.c_str());
}

const KernelSet * choose_kernels(std::string precision, bool on_cpu) {
    if (precision.empty() || precision == "auto") {
        precision = env_precision();
    }
    const bool any = precision.empty() || precision == "auto";
    if (!any && precision != "f32" && precision != "bf16") {
        fail(Status::bad_argument, "precision '%s' is not known; there are: auto, f32, bf16", precision.c_str());
    }
    if (!on_cpu) {
        if (precision == "bf16") {
            fail(Status::unsupported, "precision 'bf16' is for the CPU; other devices compute as ggml does: take 'auto'");
        }
        return nullptr;
    }
    const std::string name = env_kernels();
    return kernel_set(name, any ? name.empty() && has_native_bf16() : precision == "bf16");
}

template <typename Function> Function procedure(ggml_backend_dev_t device, const char * name) {
    return reinterpret_cast<Function>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), name));
}

} // namespace

std::vector<DeviceInfo> devices() {
    load_backends();
    std::vector<DeviceInfo> out;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        DeviceInfo info{ggml_backend_dev_name(device), ggml_backend_dev_description(device), 0, 0, is_cpu_device(device)};
        ggml_backend_dev_memory(device, &info.memory_free, &info.memory_total);
        out.push_back(info);
    }
    return out;
}

void add_rpc_devices(const std::string & endpoint) {
    load_backends();
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (!rpc) {
        fail(Status::unsupported,
             "ggml was built without its RPC backend; install it with CMAKE_ARGS=\"-DGGML_RPC=ON\" "
             "pip install --force-reinstall --no-binary libggml-python libggml-python");
    }
    using AddServer = ggml_backend_reg_t (*)(const char *);
    const auto add = reinterpret_cast<AddServer>(ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"));
    ggml_backend_reg_t server = add ? add(endpoint.c_str()) : nullptr;
    if (!server || ggml_backend_reg_dev_count(server) == 0) {
        fail(Status::io, "%s: no RPC server answers there; start one with ggml's rpc-server", endpoint.c_str());
    }
    if (!ggml_backend_reg_by_name(ggml_backend_reg_name(server))) { // not asked for before
        ggml_backend_register(server);
    }
}

std::string ggml_info() {
    load_backends();
    std::string out = text("ggml: %s (%s)\n", ggml_version(), ggml_commit());
    const auto features = procedure<ggml_backend_get_features_t>(cpu_device(), "ggml_backend_get_features");
    std::string names;
    for (auto * feature = features ? features(ggml_backend_dev_backend_reg(cpu_device())) : nullptr;
         feature && feature->name; ++feature) {
        if (std::string(feature->value) != "0") {
            names += (names.empty() ? "" : " ") + std::string(feature->name);
        }
    }
    return out + "ggml CPU features: " + names + "\n";
}

std::string kernels_info() {
    const KernelSet * kernels = choose_kernels("", true);
    return text("CPU kernels: %s\nprecision auto: %s\n", kernels ? kernels->name : "reference",
                kernels && kernels->bf16 ? "bf16" : "f32");
}

Device::Device(const std::string & name, int threads, const std::string & precision) {
    load_backends();
    ggml_backend_dev_t device = choose(name);
    if (threads < 0 || threads > 4096) {
        fail(Status::bad_argument, "threads %d: must be between 1 and 4096, or 0 for one per core", threads);
    }
    kernels_ = choose_kernels(precision, is_cpu_device(device));
    threads_ = threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    name_ = ggml_backend_dev_name(device);

    std::vector<ggml_backend_ptr> owned;
    owned.emplace_back(ggml_backend_dev_init(device, nullptr));
    if (!is_cpu_device(device)) {
        owned.emplace_back(ggml_backend_dev_init(cpu_device(), nullptr));
    }
    for (auto & backend : owned) {
        if (!backend) {
            fail(Status::unsupported, "backend '%s' is listed by ggml but could not be started", name_.c_str());
        }
        ggml_backend_dev_t of = ggml_backend_get_device(backend.get());
        if (const auto set = procedure<ggml_backend_set_n_threads_t>(of, "ggml_backend_set_n_threads")) {
            set(backend.get(), kernels_ ? 1 : threads_); // kernels have threads of their own
        }
        if (const auto set = procedure<ggml_backend_set_abort_callback_t>(of, "ggml_backend_set_abort_callback")) {
            set(backend.get(), should_abort, this);
        }
    }
    if (kernels_) {
        pool_ = std::make_unique<Pool>(threads_);
    }
    for (auto & backend : owned) {
        backends_.push_back(backend.release());
    }
}

Device::~Device() {
    for (ggml_backend * backend : backends_) {
        ggml_backend_free(backend);
    }
}

size_t Device::memory_free() const {
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(ggml_backend_get_device(backends_[0]), &free, &total);
    return total > 0 ? free : 0;
}

size_t Device::memory_left() const {
    const size_t free = is_cpu() ? available_memory() : memory_free();
    return free > 0 ? free : std::numeric_limits<size_t>::max();
}

void Device::set_keep_going(std::function<bool()> keep_going) { keep_going_ = std::move(keep_going); }

bool Device::should_abort(void * self) {
    return !static_cast<Device *>(self)->keep_going();
}

} // namespace sd
