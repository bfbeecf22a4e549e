// What this build is and what it can name: version, devices, samplers, schedulers, families.
#include "c_api/guard.h"

#include "families/family.h"
#include "nn/device.h"
#include "sampling/rng.h"
#include "sampling/sampler.h"
#include "sampling/schedule.h"

using sd::guarded;
using sd::name_at;
using sd::need;

const char * sd_version(void) { return SDCPP_VERSION; }

const char * sd_sampler_name(int index) { return name_at(sd::sampler_names(), index); }
const char * sd_scheduler_name(int index) { return name_at(sd::scheduler_names(), index); }
const char * sd_rng_name(int index) { return name_at(sd::rng_names(), index); }

const char * sd_family_name(int index) {
    return sd::is_index(sd::families(), index) ? sd::families()[index]->name : nullptr;
}

bool sd_get_device(int index, sd_device * device) {
    static thread_local std::vector<sd::DeviceInfo> known; // keeps the strings alive until the thread asks again
    if (index <= 0 && guarded([] { known = sd::devices(); }) != SD_OK) {
        return false;
    }
    if (!device || !sd::is_index(known, index)) {
        return false;
    }
    const sd::DeviceInfo & info = known[index];
    *device = {info.name.c_str(), info.description.c_str(), info.memory_free, info.memory_total, info.is_cpu};
    return true;
}

sd_status sd_add_rpc_devices(const char * endpoint) {
    return guarded([&] {
        need(endpoint, "endpoint");
        sd::add_rpc_devices(endpoint);
    });
}

const char * sd_build_info(void) {
    static const std::string info = [] {
        std::string ggml;
        if (guarded([&] { ggml = sd::ggml_info(); }) != SD_OK) {
            ggml = std::string("ggml: ") + sd_last_error() + "\n";
        }
        std::string kernels;
        if (guarded([&] { kernels = sd::kernels_info(); }) != SD_OK) {
            kernels = std::string("CPU kernels: ") + sd_last_error() + "\n";
        }
        return sd::text("sdcpp: %s\ncompiler: %s\n", SDCPP_VERSION, __VERSION__) + kernels + ggml;
    }();
    return info.c_str();
}
