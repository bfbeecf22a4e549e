#include "context.h"

#include "claim.h"
#include "core/error.h"
#include "pixels.h"
#include "sampling/sampler.h"
#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace sd {

Context::Context(const OpenParams & params)
    : log_(params.log), device_(params.backend, params.threads, params.precision),
      weights_(Checkpoint::open(params.model, params.components, params.in_ram)),
      family_(&recognise(weights_.checkpoint())),
      pipeline_(family_->open(weights_, {params.data_dir, params.prediction, params.zero_snr})), runner_(device_, weights_),
      lora_names_(weights_),
      loras_(weights_, device_,
             [this](const std::string & path) { return read_with_settings(path); },
             params.loras) {
    if (pipeline_->prediction() == Prediction::flow && (!params.prediction.empty() || params.zero_snr.value_or(false))) {
        fail(Status::bad_argument, "prediction and zero_snr: a model of %s is a rectified flow, which has neither",
             family_->written().c_str());
    }
    weights_.load(device_, params.memory_limit, log_);
    if (log_) {
        log_(Level::info, text("%s: %s, %zu weights, %zu MB on %s, kernels %s, precision %s", params.model.c_str(),
                               family_->name, weights_.weights().size(), weights_.resident_bytes() >> 20,
                               device_.name().c_str(), device_.kernels_name(), device_.precision()));
    }
}

// The denoiser's outputs for the prompts, of `one` number each, become the guided ones; those for the negative prompts
// lie behind them. Of the result a share is scaled to the spread that the prompt's own had (Lin et al., 2023, "Common
// Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4), since guidance exaggerates it.
static void guide(std::vector<float> & out, const Request & r, size_t one) {
    const auto spread = [&](const float * of) {
        double sum = 0, squares = 0;
        for (size_t i = 0; i < one; ++i) {
            sum += of[i];
            squares += static_cast<double>(of[i]) * of[i];
        }
        const double n = static_cast<double>(one);
        return std::sqrt(std::max(0.0, squares / n - sum / n * (sum / n)));
    };
    const size_t n = one * static_cast<size_t>(r.batch_size);
    for (size_t begin = 0; begin < n; begin += one) {
        float *      to = out.data() + begin;
        const double plain = r.guidance_rescale > 0 ? spread(to) : 0;
        for (size_t i = 0; i < one; ++i) {
            const float without = to[n + i];
            to[i] = without + r.cfg_scale * (to[i] - without);
        }
        const double guided = r.guidance_rescale > 0 ? spread(to) : 0;
        if (guided > 0) {
            const double share = r.guidance_rescale;
            const auto   factor = static_cast<float>(share * plain / guided + 1 - share);
            std::transform(to, to + one, to, [&](float value) { return value * factor; });
        }
    }
}

void Context::generate(Request r, uint8_t * rgb) {
    const Claim claim(*this, r.keep_going);
    complete(r);
    loras_.apply(r.loras);
    check_control(r);
    hint_at_settings(r);
    paint(r, rgb);
}

MemoryEstimate Context::estimate(Request r) {
    const Claim claim(*this, r.keep_going);
    complete(r);
    std::vector<uint8_t> nothing(static_cast<size_t>(r.width) * r.height * 3);
    if (pipeline_->extra_input() == ExtraInput::control || loras_.control_inputs() > 0) {
        r.control_image = nothing.data();
    }
    check_control(r);
    r.sampler = "euler";
    r.steps = 1;
    r.strength = 1;
    r.on_step = {};
    std::vector<NetworkCost> costs;
    std::vector<uint8_t>     rgb(static_cast<size_t>(r.batch_size) * r.width * r.height * 3);
    // Text has to be encoded once more for it, and what was painted before stays what it is.
    auto       encoded = std::exchange(encoded_, {});
    auto       latent = std::exchange(last_latent_, {});
    const auto back = [&] {
        runner_.set_measuring(nullptr);
        encoded_ = std::move(encoded);
        last_latent_ = std::move(latent);
    };
    runner_.set_measuring(&costs);
    try {
        paint(r, rgb.data());
    } catch (...) {
        back();
        throw;
    }
    back();
    return sd::estimate(weights_, costs);
}

// The noise levels that are left where painting begins with a picture: the weaker the change, the further down.
static std::vector<float> levels_below(std::vector<float> sigmas, float strength) {
    const auto steps = static_cast<int64_t>(sigmas.size()) - 1;
    const auto kept = std::min(steps, static_cast<int64_t>(static_cast<double>(steps) * strength));
    sigmas.erase(sigmas.begin(), sigmas.begin() + (steps - kept));
    return sigmas;
}

// Each image's noise, of its own generator, at the first level; on `kept` of the picture to start from, where there is one.
static std::vector<float> first_latents(const std::vector<std::unique_ptr<Rng>> & rngs, size_t one, float sigma,
                                        const std::optional<Tensor> & init, float kept) {
    std::vector<float> x(one * rngs.size());
    for (size_t image = 0; image < rngs.size(); ++image) {
        float * at = x.data() + image * one;
        rngs[image]->normal(at, one);
        for (size_t i = 0; i < one; ++i) {
            at[i] = at[i] * sigma + (init ? init->data[i] * kept : 0.0f);
        }
    }
    return x;
}

void Context::paint(const Request & r, uint8_t * rgb) {
    runner_.adapt(nullptr);
    const bool          guided = r.cfg_scale != 1.0f;
    const Latents       begin = start(r);
    const NoiseSchedule trained = pipeline_->noise_schedule(begin.ne, r.shift);
    std::vector<float>  sigmas = make_sigmas(r.scheduler, trained, r.steps);
    warn_unread(r, guided);
    const Conditioning  conditioning = condition(r, guided);

    if (begin.init) {
        sigmas = levels_below(std::move(sigmas), r.strength);
    }
    std::vector<std::unique_ptr<Rng>> rngs;
    for (int image = 0; image < r.batch_size; ++image) {
        rngs.push_back(make_rng(r.rng, r.seed + image));
    }
    const Prediction   prediction = pipeline_->prediction();
    const float        kept = prediction == Prediction::flow ? 1 - sigmas.front() : 1.0f;
    const size_t       one = static_cast<size_t>(count(begin.ne)) / r.batch_size;
    const size_t       plane = static_cast<size_t>(begin.ne[0] * begin.ne[1]);
    std::vector<float> x = first_latents(rngs, one, sigmas.front(), begin.init, kept);

    const int    runs = guided ? 2 * r.batch_size : r.batch_size;
    const std::optional<Tensor> reference = encode_reference(r, runs);
    const size_t extra = begin.extra ? begin.extra->data.size() : 0;
    const int64_t channels = begin.ne[2] + (begin.extra ? begin.extra->ne[2] : 0);
    Tensor        latent({begin.ne[0], begin.ne[1], channels, runs}), time({runs, 1, 1, 1}), guidance({runs, 1, 1, 1});
    Inputs       inputs{{"latent", &latent}, {"time", &time}};
    if (pipeline_->defaults().guidance > 0) {
        std::fill(guidance.data.begin(), guidance.data.end(), r.guidance);
        inputs["guidance"] = &guidance;
    }
    if (reference) {
        inputs["reference"] = &*reference;
    }
    for (const auto * part : {&conditioning.tokens, &conditioning.vectors}) {
        for (const auto & [name, tensor] : *part) {
            inputs[name] = &tensor;
        }
    }
    const int  steps = static_cast<int>(sigmas.size()) - 1;
    int        done = 0;
    const auto denoise = [&](const std::vector<float> & noisy, float sigma, std::vector<float> & denoised) {
        const float spread = prediction == Prediction::flow ? 1.0f : std::sqrt(sigma * sigma + 1);
        for (int run = 0; run < runs; ++run) {
            float *       to = latent.data.data() + run * (one + extra);
            const float * from = noisy.data() + (run % r.batch_size) * one;
            std::transform(from, from + one, to, [&](float value) { return value / spread; });
            if (begin.extra) {
                std::copy(begin.extra->data.begin(), begin.extra->data.end(), to + one);
            }
            time.data[run] = trained.timestep(sigma);
        }
        if (loras_.adapters()) {
            runner_.adapt(loras_.adapters(), loras_.denoiser_strengths(done, steps, runs));
        }
        auto         outputs = runner_.run("denoise", inputs, [&](Graph & g) { g.output("out", pipeline_->denoise(g)); });
        std::vector<float> & out = outputs.at("out").data;
        if (guided) {
            guide(out, r, one);
        }
        denoised.resize(noisy.size());
        for (size_t i = 0; i < noisy.size(); ++i) {
            const float model = out[i];
            denoised[i] = prediction == Prediction::v ? (noisy[i] / spread - sigma * model) / spread
                                                                   : noisy[i] - sigma * model;
            if (begin.mask) { // what is not to be repainted is known
                const float repaint = begin.mask->data[i % plane];
                denoised[i] = repaint * denoised[i] + (1 - repaint) * begin.init->data[i % one];
            }
        }
    };
    const auto on_step = [&](int step, int of, const std::vector<float> & denoised) {
        done = step;
        if (!r.on_step) {
            return;
        }
        estimate_ = &denoised;
        estimate_ne_ = begin.ne;
        const bool go_on = r.on_step(step, of);
        estimate_ = nullptr;
        if (!go_on) {
            fail(Status::cancelled, "stopped after step %d of %d", step, of);
        }
    };
    sample(r.sampler, {sigmas, &rngs, r.eta, prediction == Prediction::flow, denoise, on_step, &trained}, x);
    if (!std::all_of(x.begin(), x.end(), [](float value) { return std::isfinite(value); })) {
        fail(Status::bad_argument, "the picture is no number after %d steps, and would be black: cfg_scale %g, eta or a "
             "multiplier of a LoRA is too large, or the model's weights are damaged", steps, static_cast<double>(r.cfg_scale));
    }

    last_latent_.ne = begin.ne;
    last_latent_.data = std::move(x);
    decode(r, last_latent_, rgb);
}

void Context::decode(const Request & r, const Tensor & latent, uint8_t * rgb) {
    const LatentFormat format = pipeline_->latent_format();
    const int          pixels = tile_for(r, r.width, r.height);
    const int64_t      tile = pixels > 0 ? pixels / format.reduction : std::max(latent.ne[0], latent.ne[1]);
    const size_t       one = static_cast<size_t>(count(latent.ne)) / r.batch_size;
    const int64_t      plane = static_cast<int64_t>(r.width) * r.height;
    runner_.adapt(nullptr);
    for (int image = 0; image < r.batch_size; ++image) { // one at a time: the decoder needs the most memory of all
        Tensor unscaled({latent.ne[0], latent.ne[1], latent.ne[2], 1});
        std::transform(latent.data.begin() + image * one, latent.data.begin() + (image + 1) * one, unscaled.data.begin(),
                       [&](float value) { return value / format.scale + format.shift; });
        const Tensor picture = in_tiles(unscaled, tile, format.reduction, 1, [&](const Tensor & part) {
            return runner_
                .run("vae_decode", {{"latent", &part}}, [&](Graph & g) { g.output("image", pipeline_->decode_latent(g)); })
                .at("image");
        });
        uint8_t * out = rgb + image * 3 * plane;
        rgb_from_image(picture, 0, out);
        for (int64_t i = 0; r.mask && i < 3 * plane; ++i) { // pixels outside the mask stay as they were
            const int repaint = r.mask[i / 3];
            out[i] = static_cast<uint8_t>((out[i] * repaint + r.init_image[i] * (255 - repaint) + 127) / 255);
        }
    }
}

} // namespace sd
