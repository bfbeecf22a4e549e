// A model, opened and described.
#include "c_api/handle.h"

#include <cstring>

using sd::guarded;
using sd::need;
using sd::or_empty;
using sd::to_components;

namespace {

bool is_in_ram(const std::string & base_copy) {
    if (!base_copy.empty() && base_copy != "file" && base_copy != "ram") {
        sd::fail(sd::Status::bad_argument, "base_copy '%s' is not known; there are: file, ram", base_copy.c_str());
    }
    return base_copy == "ram";
}

sd::LoraOptions to_lora_options(const sd_open_params & from) {
    const std::string mode = from.lora_mode ? from.lora_mode : "runtime";
    if (mode != "runtime" && mode != "restore" && mode != "diff") {
        sd::fail(sd::Status::bad_argument, "lora_mode '%s' is not known; there are: runtime, restore, diff", mode.c_str());
    }
    sd::LoraOptions options;
    options.mode = mode == "restore" ? sd::LoraMode::restore : mode == "diff" ? sd::LoraMode::diff : sd::LoraMode::runtime;
    options.merge.requantise = from.requantise;
    options.strict = from.strict_loras;
    if (from.lora_cache > 0) {
        options.cache_bytes = from.lora_cache;
    }
    return options;
}

} // namespace

sd_open_params sd_default_open_params(void) { return {}; }

sd_status sd_open(const sd_open_params * params, sd_ctx ** ctx) {
    if (ctx) {
        *ctx = nullptr;
    }
    return guarded([&] {
        need(ctx, "ctx");
        need(params, "params");
        need(params->model, "params.model");
        sd::OpenParams open;
        open.model = params->model;
        open.components = to_components(params->components, params->n_components);
        open.data_dir = or_empty(params->data_dir);
        open.backend = or_empty(params->backend);
        open.prediction = or_empty(params->prediction);
        if (params->zero_snr != 0) {
            open.zero_snr = params->zero_snr > 0;
        }
        open.threads = params->threads;
        open.precision = or_empty(params->precision);
        open.in_ram = is_in_ram(or_empty(params->base_copy));
        open.memory_limit = params->memory_limit;
        open.loras = to_lora_options(*params);
        if (params->log) {
            open.log = [call = params->log, user = params->log_user](sd::Level level, const std::string & message) {
                call(static_cast<sd_log_level>(level), message.c_str(), user);
            };
            open.loras.log = open.log;
        }
        *ctx = new sd_ctx(open);
    });
}

void sd_close(sd_ctx * ctx) { delete ctx; }

sd_model_info sd_get_model_info(const sd_ctx * ctx) {
    if (!ctx) {
        return {};
    }
    const sd::Context &  context = ctx->context;
    const sd::Pipeline & pipeline = context.pipeline();
    return {context.family().name,
            pipeline.prediction() == sd::Prediction::v      ? "v"
            : pipeline.prediction() == sd::Prediction::flow ? "flow"
                                                            : "eps",
            context.device().name().c_str(),
            context.device().threads(),
            context.device().kernels_name(),
            context.device().precision(),
            pipeline.size_multiple(),
            pipeline.native_size(),
            static_cast<int>(pipeline.latent_format().channels),
            pipeline.input_channels(),
            context.weights().resident_bytes(),
            static_cast<int>(context.weights().weights().size()),
            pipeline.latent_format().reduction,
            pipeline.is_zero_snr(),
            pipeline.redux_size()};
}

sd_status sd_fingerprint(sd_ctx * ctx, char hex[65]) {
    return guarded([&] {
        need(ctx, "ctx");
        need(hex, "hex");
        std::memcpy(hex, ctx->context.fingerprint().c_str(), 65);
    });
}
