// LoRAs of a context.
#include "c_api/handle.h"

#include <algorithm>

using sd::guarded;
using sd::name_at;
using sd::need;
using sd::to_loras;

sd_status sd_apply_loras(sd_ctx * ctx, const sd_lora * loras, int n_loras) {
    return guarded([&] {
        need(ctx, "ctx");
        ctx->context.apply_loras({{to_loras(loras, n_loras)}});
    });
}

sd_status sd_reset_loras(sd_ctx * ctx) {
    return guarded([&] {
        need(ctx, "ctx");
        ctx->context.reset_loras();
    });
}

bool sd_get_lora(const sd_ctx * ctx, int image, int index, sd_lora * lora) {
    if (!ctx || !lora || image < 0) {
        return false;
    }
    const auto & images = ctx->context.loras().state().images;
    if (images.empty()) {
        return false;
    }
    const auto & uses = images[images.size() == 1 ? 0 : std::min<size_t>(image, images.size() - 1)];
    if (!sd::is_index(uses, index)) {
        return false;
    }
    const sd::LoraUse & use = uses[index];
    *lora = {use.path.c_str(), {use.text[0], use.text[1], use.text[2]}, use.unet, use.start, use.stop, nullptr, 0};
    return true;
}

const char * sd_lora_report(sd_ctx * ctx, int index) {
    const sd_status status = guarded([&] {
        need(ctx, "ctx");
        if (index <= 0) {
            ctx->reports.clear();
            for (const sd::LoraReport & report : ctx->context.loras().reports()) {
                ctx->reports.push_back(sd::report_json(report));
            }
        }
    });
    return status == SD_OK ? name_at(ctx->reports, index) : nullptr;
}

sd_status sd_inspect_lora(sd_ctx * ctx, const char * path, const char ** json) {
    return guarded([&] {
        need(ctx, "ctx");
        need(path, "path");
        need(json, "json");
        ctx->inspected = sd::report_json(ctx->context.inspect_lora(path));
        *json = ctx->inspected.c_str();
    });
}

sd_status sd_lora_drift(sd_ctx * ctx, double * drift) {
    return guarded([&] {
        need(ctx, "ctx");
        need(drift, "drift");
        *drift = ctx->context.lora_drift();
    });
}
