#include "loras.h"
#include "context.h"

namespace binding {

Loras::Loras(const std::vector<py::dict> & all) {
    for (const py::dict & lora : all) {
        paths_.push_back(lora["path"].cast<std::string>());
        prefixes_.push_back(lora["blocks"].cast<std::vector<std::pair<std::string, double>>>());
    }
    for (size_t i = 0; i < all.size(); i++) {
        std::vector<sd_lora_block> & blocks = blocks_.emplace_back();
        for (const auto & [prefix, factor] : prefixes_[i]) {
            blocks.push_back({c_text(prefix, "blocks"), factor});
        }
        const auto number = [&](const char * key) { return all[i][key].cast<double>(); };
        loras_.push_back({c_text(paths_[i], "path"), {number("te"), number("te2"), number("te3")}, number("unet"),
                          number("start"), number("stop"), blocks.data(), static_cast<int>(blocks.size())});
    }
}

namespace {

void apply_loras(const Context & context, const std::vector<py::dict> & loras) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    const Loras wanted(loras);
    check(released([&] { return sd_apply_loras(ctx.get(), wanted.data(), wanted.size()); }));
}

void reset_loras(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    check(released([&] { return sd_reset_loras(ctx.get()); }));
}

// (path, te, te2, te3, unet, start, stop) of each that acts on an image.
py::list lora_state(const Context & context, int image) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    py::list out;
    sd_lora lora;
    for (int i = 0; sd_get_lora(ctx.get(), image, i, &lora); i++) {
        out.append(py::make_tuple(text(lora.path), lora.text[0], lora.text[1], lora.text[2], lora.unet, lora.start,
                                  lora.stop));
    }
    return out;
}

py::list lora_reports(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    py::list out;
    for (int i = 0; const char * json = sd_lora_report(ctx.get(), i); i++) {
        out.append(text(json));
    }
    return out;
}

py::str inspect_lora(const Context & context, const std::string & path) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    const char * json = nullptr;
    const char * file = c_text(path, "path");
    check(released([&] { return sd_inspect_lora(ctx.get(), file, &json); }));
    return text(json);
}

double lora_drift(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    double drift = 0;
    check(released([&] { return sd_lora_drift(ctx.get(), &drift); }));
    return drift;
}

} // namespace

void bind_loras(ContextClass & context) {
    context.def("apply_loras", apply_loras, "loras"_a)
        .def("reset_loras", reset_loras)
        .def("lora_state", lora_state, "image"_a = 0)
        .def("lora_reports", lora_reports)
        .def("inspect_lora", inspect_lora, "path"_a)
        .def("lora_drift", lora_drift);
}

} // namespace binding
