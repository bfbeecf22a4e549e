// Pictures, and what is learned on the way to them.
#include "c_api/handle.h"

#include "sampling/rng.h"

using sd::guarded;
using sd::need;
using sd::or_empty;
using sd::to_loras;
using sd::to_tensor;

namespace {

sd::Prompt to_prompt(const sd_prompt & from) {
    sd::Prompt prompt;
    for (int i = 0; i < from.n_spans; ++i) {
        need(from.spans, "the spans of a prompt");
        prompt.push_back({or_empty(from.spans[i].text), from.spans[i].weight, from.spans[i].text == nullptr});
    }
    return prompt;
}

std::vector<sd::Prompt> to_prompts(const sd_prompt * from, int n) {
    std::vector<sd::Prompt> prompts;
    for (int i = 0; i < n; ++i) {
        need(from, "the list of prompts");
        prompts.push_back(to_prompt(from[i]));
    }
    return prompts;
}

sd::PictureSizes to_sizes(const sd_sizes & from) {
    return {from.original_width, from.original_height, from.crop_top, from.crop_left, from.target_width, from.target_height};
}

sd::Request to_request(const sd_request & from) {
    sd::Request request;
    request.prompts = to_prompts(from.prompts, from.n_prompts);
    request.negative_prompts = to_prompts(from.negative_prompts, from.n_negative_prompts);
    for (int i = 0; i < from.n_prompts; ++i) {
        request.loras.images.push_back(to_loras(from.prompts[i].loras, from.prompts[i].n_loras));
    }
    request.width = from.width;
    request.height = from.height;
    request.steps = from.steps;
    request.sizes = to_sizes(from.sizes);
    request.negative_sizes = to_sizes(from.negative_sizes);
    request.cfg_scale = from.cfg_scale;
    request.guidance_rescale = from.guidance_rescale;
    request.guidance = from.guidance;
    request.shift = from.shift;
    request.seed = from.seed;
    request.batch_size = from.batch_size;
    request.sampler = or_empty(from.sampler);
    request.scheduler = or_empty(from.scheduler);
    request.rng = or_empty(from.rng);
    request.eta = from.eta;
    request.clip_skip = from.clip_skip;
    request.init_image = from.init_image;
    request.strength = from.strength;
    request.mask = from.mask;
    request.control_image = from.control_image;
    request.reference_image = from.reference_image;
    request.reference_width = from.reference_width;
    request.reference_height = from.reference_height;
    request.redux_image = from.redux_image;
    request.redux_strength = from.redux_strength;
    request.vae_tile = from.vae_tile;
    void * user = from.user;
    if (from.on_step) {
        request.on_step = [call = from.on_step, user](int step, int steps) { return call(step, steps, user); };
    }
    if (from.keep_going) {
        request.keep_going = [call = from.keep_going, user] { return call(user); };
    }
    return request;
}

} // namespace

sd_request sd_default_request(const sd_ctx * ctx) {
    if (!ctx) {
        return {};
    }
    const sd::Pipeline & pipeline = ctx->context.pipeline();
    const sd::Defaults   defaults = pipeline.defaults();
    sd_request           request{};
    request.width = request.height = pipeline.native_size();
    request.sizes = request.negative_sizes = {0, 0, -1, -1, 0, 0};
    request.steps = defaults.steps;
    request.cfg_scale = defaults.cfg_scale;
    request.guidance = defaults.guidance > 0 ? defaults.guidance : -1;
    request.batch_size = 1;
    request.sampler = defaults.sampler;
    request.scheduler = defaults.scheduler;
    request.rng = sd::rng_names().front().c_str();
    request.eta = -1;
    request.clip_skip = defaults.clip_skip;
    request.strength = defaults.strength;
    request.redux_strength = 1;
    return request;
}

sd_status sd_generate(sd_ctx * ctx, const sd_request * request, uint8_t * rgb) {
    return guarded([&] {
        need(ctx, "ctx");
        need(request, "request");
        need(rgb, "rgb");
        ctx->context.generate(to_request(*request), rgb);
    });
}

sd_status sd_estimate_memory(sd_ctx * ctx, const sd_request * request, size_t * peak, sd_on_network on_network, void * user) {
    return guarded([&] {
        need(ctx, "ctx");
        need(request, "request");
        need(peak, "peak");
        const sd::MemoryEstimate estimate = ctx->context.estimate(to_request(*request));
        *peak = estimate.peak;
        for (const auto & network : estimate.networks) {
            const sd_network_memory memory{network.name.c_str(), network.weights, network.activations};
            if (on_network && !on_network(&memory, user)) {
                break;
            }
        }
    });
}

sd_status sd_preview(sd_ctx * ctx, int image, uint8_t * rgb) {
    return guarded([&] {
        need(ctx, "ctx");
        need(rgb, "rgb");
        ctx->context.preview(image, rgb);
    });
}

sd_status sd_collect_importance(sd_ctx * ctx, bool on) {
    return guarded([&] {
        need(ctx, "ctx");
        ctx->context.set_observing(on);
    });
}

bool sd_get_importance(const sd_ctx * ctx, int index, sd_importance * importance) {
    if (!ctx || !importance || !sd::is_index(ctx->context.importance(), index)) {
        return false;
    }
    const auto & [name, of] = *std::next(ctx->context.importance().begin(), index);
    *importance = {name.c_str(), static_cast<int64_t>(of.sums.size()), of.rows, of.sums.data()};
    return true;
}

sd_status sd_learn_words(sd_ctx * ctx, const sd_learned_word * words, int n_words) {
    return guarded([&] {
        need(ctx, "ctx");
        std::vector<sd::LearnedText> texts;
        for (int i = 0; i < n_words; ++i) {
            need(words, "the list of words");
            sd::LearnedText & text = texts.emplace_back();
            text.name = or_empty(words[i].name);
            for (int k = 0; k < 2 && words[i].data[k]; ++k) {
                const sd_tensor vectors{words[i].name, {words[i].width[k], words[i].vectors, 1, 1},
                                        const_cast<float *>(words[i].data[k])};
                text.vectors.push_back(to_tensor(vectors));
            }
        }
        ctx->context.learn(texts);
    });
}

sd_status sd_count_tokens(sd_ctx * ctx, const char * text, int * count) {
    return guarded([&] {
        need(ctx, "ctx");
        need(text, "text");
        need(count, "count");
        *count = ctx->context.count_tokens(text);
    });
}
