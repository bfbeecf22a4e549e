// `_native`: the C header as Python sees it. Nothing is decided here: arguments are checked and completed by
// context.py and by the library; these files turn numpy into pointers and statuses into exceptions.
#include "context.h"

using namespace binding;

namespace {

py::list names(const char * (*name)(int)) {
    py::list out;
    for (int i = 0; name(i); i++) {
        out.append(text(name(i)));
    }
    return out;
}

py::list devices() {
    py::list out;
    sd_device device;
    for (int i = 0; sd_get_device(i, &device); i++) {
        out.append(py::dict("name"_a = text(device.name), "description"_a = text(device.description),
                            "memory_free"_a = device.memory_free, "memory_total"_a = device.memory_total,
                            "is_cpu"_a = device.is_cpu));
    }
    if (out.empty()) { // ggml always has the CPU, unless it cannot run here
        check(SD_UNSUPPORTED);
    }
    return out;
}

} // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The engine of sdcpp_py, as sdcpp.h offers it. Use sdcpp_py.SDContext instead.";

    ContextClass context = bind_context(m);
    bind_generate(m, context);
    bind_loras(context);
    bind_weights(m);
    bind_lora_files(m);
    bind_probe(m);

    m.def("version", [] { return text(sd_version()); });
    m.def("build_info", [] { return text(sd_build_info()); });
    m.def("samplers", [] { return names(sd_sampler_name); });
    m.def("schedulers", [] { return names(sd_scheduler_name); });
    m.def("rngs", [] { return names(sd_rng_name); });
    m.def("families", [] { return names(sd_family_name); });
    m.def("devices", &devices);
    m.def(
        "add_rpc_devices",
        [](const std::string & endpoint) {
            const char * server = c_text(endpoint, "endpoint");
            check(released([&] { return sd_add_rpc_devices(server); })); // it may be far away
        },
        "endpoint"_a);
}
