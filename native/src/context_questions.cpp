// What a context answers beside pictures: previews, LoRAs, measurements, and its networks alone.
#include "claim.h"
#include "context.h"
#include "families/distilled.h"
#include "preview.h"

namespace sd {

void Context::preview(int image, uint8_t * rgb) {
    if (!estimate_) {
        fail(Status::bad_argument, "a preview can be had inside on_step only");
    }
    if (image < 0 || image >= estimate_ne_[3]) {
        fail(Status::bad_argument, "preview of image %d: the batch has images 0 to %lld", image,
             static_cast<long long>(estimate_ne_[3] - 1));
    }
    if (preview_map_.empty()) {
        const Tensor chart = preview_chart(pipeline_->latent_format().reduction);
        preview_map_ = fit_preview(chart, encode_picture(chart.data, static_cast<int>(chart.ne[0]),
                                                         static_cast<int>(chart.ne[1]), 0));
    }
    paint_preview(preview_map_, *estimate_, estimate_ne_, image, rgb);
}

std::string Context::fingerprint() {
    const Claim claim(*this, {});
    return weights_.fingerprint();
}

int Context::count_tokens(const std::string & text) const { return pipeline_->count_tokens(text); }

void Context::learn(const std::vector<LearnedText> & words) {
    const Claim claim(*this, {});
    pipeline_->learn(words);
    encoded_.clear();
}

Tensor Context::encode_text(const std::string & text) {
    const Claim  claim(*this, {});
    const Prompt prompt{{text, 1.0f, false}};
    return pipeline_->encode(runner_, prompt, pipeline_->defaults().clip_skip, pipeline_->count_chunks(prompt)).tokens.at("text");
}

void Context::apply_loras(const LoraState & wanted) {
    const Claim claim(*this, {});
    loras_.apply(wanted);
}

void Context::reset_loras() {
    const Claim claim(*this, {});
    loras_.reset();
}

double Context::lora_drift() {
    const Claim claim(*this, {});
    return loras_.drift();
}

LoraReport Context::inspect_lora(const std::string & path) {
    const Claim claim(*this, {});
    return read_with_settings(path).report;
}

LoraFile Context::read_with_settings(const std::string & lora) const {
    LoraFile   file = read_lora(lora, lora_names_, family_->written());
    const auto settings = settings_of_lora(lora, *pipeline_);
    file.report.settings = settings ? settings->sentence : "";
    return file;
}

void Context::set_profiling(bool on) {
    profile_.clear();
    runner_.set_profile(on ? &profile_ : nullptr);
}

void Context::set_observing(bool on) {
    const Claim claim(*this, {});
    importance_.clear();
    encoded_.clear(); // text has to be encoded again to be seen
    if (!on) {
        runner_.set_observer({});
        return;
    }
    runner_.set_observer([this](const Weight & matrix, const Tensor & x) {
        Importance & of = importance_[matrix.name];
        const size_t columns = static_cast<size_t>(x.ne[0]);
        of.sums.resize(columns);
        for (size_t i = 0; i < x.data.size(); ++i) {
            of.sums[i % columns] += static_cast<double>(x.data[i]) * static_cast<double>(x.data[i]);
        }
        of.rows += static_cast<int64_t>(x.data.size() / columns);
    });
}

Tensor Context::probe(const std::string & network, const std::map<std::string, Tensor> & given) {
    const Claim claim(*this, {});
    Inputs      inputs;
    for (const auto & [name, tensor] : given) {
        inputs[name] = &tensor;
    }
    const auto skip = given.find("clip_skip");
    const bool is_text = network == "text" || network == "pooled";
    const auto build = [&](Graph & g) {
        if (is_text) {
            pipeline_->text(g, skip == given.end() ? pipeline_->defaults().clip_skip
                                                   : static_cast<int>(skip->second.data[0]));
            return;
        }
        g.output("out", network == "denoise"      ? pipeline_->denoise(g)
                        : network == "redux"      ? pipeline_->look_at(g)
                        : network == "vae_encode" ? pipeline_->encode_image(g)
                                                  : pipeline_->decode_latent(g));
    };
    const bool has_redux = network == "redux" && pipeline_->redux_size() > 0;
    if (!is_text && !has_redux && network != "denoise" && network != "vae_encode" && network != "vae_decode") {
        fail(Status::bad_argument, "network '%s' is not known; there are: text, pooled, denoise, vae_encode, vae_decode, and of "
             "FLUX with Redux redux", network.c_str());
    }
    const auto latent = given.find("latent");
    const int64_t runs = latent == given.end() ? 1 : latent->second.ne[3];
    runner_.adapt(is_text || network == "denoise" ? loras_.adapters() : nullptr,
                  is_text                             ? loras_.text_strengths(0)
                  : network == "denoise" && loras_.adapters() ? loras_.denoiser_strengths(0, 1, runs)
                                                      : Tensor());
    auto       outputs = runner_.run(network, inputs, build);
    const auto out = outputs.find(network == "text" ? "states" : network == "pooled" ? "pooled" : "out");
    if (out == outputs.end()) {
        fail(Status::bad_argument, "a model of %s has no network '%s'", family_->name, network.c_str());
    }
    return std::move(out->second);
}

} // namespace sd
