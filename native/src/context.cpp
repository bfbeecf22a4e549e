#include "context.h"

#include "core/error.h"
#include "families/distilled.h"
#include "pixels.h"
#include "preview.h"
#include "sampling/sampler.h"
#include "tiles.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <set>
#include <utility>

namespace sd {

// A context is used by one thread at a time, with the files that it opened, and asks its caller now and then whether
// to go on.
class Claim {
  public:
    Claim(Context & context, std::function<bool()> keep_going) : context_(context) {
        context_.weights_.checkpoint().verify_unchanged(
            "the model was open; open it again, with base_copy 'ram' if it may change once more");
        if (context_.busy_.exchange(true)) {
            fail(Status::busy, "this context is in use by another thread; wait for it, or open a second one");
        }
        if (keep_going) {
            using Clock = std::chrono::steady_clock;
            context_.device_.set_keep_going([keep_going, asked = Clock::now()]() mutable {
                const auto now = Clock::now();
                if (now - asked < std::chrono::milliseconds(100)) {
                    return true;
                }
                asked = now;
                return keep_going();
            });
        }
    }
    ~Claim() {
        context_.runner_.release(); // between calls there are weights in memory, and no activations
        context_.device_.set_keep_going({});
        context_.busy_ = false;
    }
    Claim(const Claim &) = delete;
    Claim & operator=(const Claim &) = delete;

  private:
    Context & context_;
};

namespace {

constexpr int     max_side = 16384;   // pixels
constexpr int     max_steps = 10000;
constexpr int     max_told = 1 << 16; // pixels of a side that SDXL is told
constexpr int     max_batch = 1024;
constexpr int     auto_tile = 512;    // pixels
constexpr int64_t whole_picture = 1024 * 1024; // pixels that go through the autoencoder without tiles
constexpr size_t  kept_conditionings = 16;
constexpr int     max_chunks = 256; // of a prompt: 19,200 tokens of CLIP

bool same(const Prompt & a, const Prompt & b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Span & x, const Span & y) {
        return x.text == y.text && x.weight == y.weight && x.is_break == y.is_break;
    });
}

void check_prompts(const char * what, const std::vector<Prompt> & prompts, int batch_size) {
    if (prompts.size() > 1 && prompts.size() != static_cast<size_t>(batch_size)) {
        fail(Status::bad_argument, "%zu %ss for a batch of %d: give one, or one per image", prompts.size(), what, batch_size);
    }
    for (const Prompt & prompt : prompts) {
        for (const Span & span : prompt) {
            if (!std::isfinite(span.weight)) {
                fail(Status::bad_argument, "the %s weights '%s' by %g; weights are finite numbers", what,
                     span.text.c_str(), static_cast<double>(span.weight));
            }
        }
    }
}

int nearest_multiple(int value, int multiple) {
    return std::max(multiple, (value + multiple / 2) / multiple * multiple);
}

// As people write it: "SDXL".
std::string written(const Family & family) {
    std::string name = family.name;
    std::transform(name.begin(), name.end(), name.begin(),
                   [](char c) { return static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c); });
    return name;
}

void append(std::vector<float> & to, const std::vector<float> & from) { to.insert(to.end(), from.begin(), from.end()); }

} // namespace

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
             written(*family_).c_str());
    }
    weights_.load(device_, params.memory_limit, log_);
    if (log_) {
        log_(Level::info, text("%s: %s, %zu weights, %zu MB on %s, kernels %s, precision %s", params.model.c_str(),
                               family_->name, weights_.weights().size(), weights_.resident_bytes() >> 20,
                               device_.name().c_str(), device_.kernels_name(), device_.precision()));
    }
}

// ---- a request -----------------------------------------------------------------------------------------

// Fills in what was left out, and refuses what can't be painted.
void Context::complete(Request & r) const {
    const Defaults defaults = pipeline_->defaults();
    const int      multiple = pipeline_->size_multiple();
    if (r.width < 1 || r.height < 1 || r.width > max_side || r.height > max_side) {
        fail(Status::bad_argument, "size %d x %d: both must be between %d and %d", r.width, r.height, multiple, max_side);
    }
    if (r.width % multiple != 0 || r.height % multiple != 0) {
        fail(Status::bad_argument, "size %d x %d: both must be multiples of %d; the nearest is %d x %d", r.width, r.height,
             multiple, nearest_multiple(r.width, multiple), nearest_multiple(r.height, multiple));
    }
    if (r.steps < 1 || r.steps > max_steps) {
        fail(Status::bad_argument, "steps %d: must be between 1 and %d", r.steps, max_steps);
    }
    if (!std::isfinite(r.cfg_scale)) {
        fail(Status::bad_argument, "cfg_scale %g: must be a finite number", static_cast<double>(r.cfg_scale));
    }
    if (!(r.guidance_rescale >= 0 && r.guidance_rescale <= 1)) {
        fail(Status::bad_argument, "guidance_rescale %g: must be between 0 and 1", static_cast<double>(r.guidance_rescale));
    }
    complete_sizes(r);
    if (!std::isfinite(r.eta)) {
        fail(Status::bad_argument, "eta %g: must be a finite number", static_cast<double>(r.eta));
    }
    if (!std::isfinite(r.guidance) || (r.guidance >= 0 && defaults.guidance == 0)) {
        fail(Status::bad_argument, "guidance %g: %s", static_cast<double>(r.guidance),
             std::isfinite(r.guidance) ? "this model takes none; use cfg_scale" : "must be a finite number");
    }
    if (!(r.shift >= 0 && r.shift <= 100)) {
        fail(Status::bad_argument, "shift %g: must be between 0 and 100", static_cast<double>(r.shift));
    }
    if (r.shift > 0 && pipeline_->prediction() != Prediction::flow) {
        fail(Status::bad_argument, "shift %g: only models of rectified flows, as FLUX and SD3, have one",
             static_cast<double>(r.shift));
    }
    if (r.batch_size < 1 || r.batch_size > max_batch) {
        fail(Status::bad_argument, "batch_size %d: must be between 1 and %d", r.batch_size, max_batch);
    }
    if (!(r.strength >= 0 && r.strength <= 1)) {
        fail(Status::bad_argument, "strength %g: must be between 0 and 1", static_cast<double>(r.strength));
    }
    if (r.mask && !r.init_image) {
        fail(Status::bad_argument, "a mask was given without init_image, the picture that it masks");
    }
    const auto fits = [&](int side) { return side >= multiple && side <= max_side && side % multiple == 0; };
    if (r.reference_image && !(fits(r.reference_width) && fits(r.reference_height))) {
        fail(Status::bad_argument, "reference_image of %d x %d: both must be multiples of %d, at most %d", r.reference_width,
             r.reference_height, multiple, max_side);
    }
    if (r.reference_image && !pipeline_->takes_reference()) {
        fail(Status::bad_argument, "a reference_image was given, but this model does not look at one; FLUX.1 Kontext does");
    }
    if (r.redux_image && pipeline_->redux_size() == 0) {
        fail(Status::bad_argument, "a redux_image was given, but there is no Redux to look at it; open a FLUX.1 with redux= and "
             "clip_vision=, its image embedder and SigLIP");
    }
    if (!std::isfinite(r.redux_strength)) {
        fail(Status::bad_argument, "redux_strength %g: must be a finite number", static_cast<double>(r.redux_strength));
    }
    if (r.vae_tile < 0 || r.vae_tile > max_side || r.vae_tile % (4 * multiple) != 0) {
        fail(Status::bad_argument, "vae_tile %d: must be 0 or a multiple of %d pixels", r.vae_tile, 4 * multiple);
    }
    if (r.prompts.empty()) {
        fail(Status::bad_argument, "no prompt was given");
    }
    check_prompts("prompt", r.prompts, r.batch_size);
    check_prompts("negative prompt", r.negative_prompts, r.batch_size);
    if (r.negative_prompts.empty()) {
        r.negative_prompts.push_back({});
    }
    if (r.clip_skip == 0) {
        r.clip_skip = defaults.clip_skip;
    }
    if (r.guidance < 0) {
        r.guidance = defaults.guidance;
    }
    r.sampler = r.sampler.empty() ? defaults.sampler : r.sampler;
    r.scheduler = r.scheduler.empty() ? defaults.scheduler : r.scheduler;
    r.rng = r.rng.empty() ? rng_names().front() : r.rng;
}

// Sizes that were left out are the picture's own, not cropped; of the negative ones as the others.
void Context::complete_sizes(Request & r) const {
    const auto each = [](PictureSizes & s) {
        return std::array<int *, 6>{&s.original_width, &s.original_height, &s.crop_top,
                                    &s.crop_left,      &s.target_width,    &s.target_height};
    };
    const auto is_crop = [](size_t i) { return i == 2 || i == 3; };
    const auto is_given = [&](size_t i, int pixels) { return is_crop(i) ? pixels >= 0 : pixels != 0; };
    PictureSizes own{r.width, r.height, 0, 0, r.width, r.height};
    const auto   fill = [&](PictureSizes & sizes, PictureSizes & usual) {
        const auto values = each(sizes), other = each(usual);
        for (size_t i = 0; i < values.size(); ++i) {
            if (!is_given(i, *values[i])) {
                *values[i] = *other[i];
            } else if (!pipeline_->takes_sizes()) {
                fail(Status::bad_argument, "original_size, crop_top_left and target_size: SDXL is told them, and this is a "
                     "model of %s; leave them out", written(*family_).c_str());
            } else if (*values[i] < (is_crop(i) ? 0 : 1) || *values[i] > max_told) {
                fail(Status::bad_argument, "original_size, crop_top_left and target_size: %d pixels; there may be %d to %d",
                     *values[i], is_crop(i) ? 0 : 1, max_told);
            }
        }
    };
    fill(r.sizes, own);
    fill(r.negative_sizes, r.sizes);
}

// A picture to follow is for models and LoRAs that look at one, and those need it.
void Context::check_control(const Request & r) const {
    const bool of_lora = loras_.control_inputs() > 0, of_model = pipeline_->extra_input() == ExtraInput::control;
    if (of_lora && pipeline_->extra_input() != ExtraInput::none) {
        fail(Status::bad_argument, "a control LoRA is for the plain model; this one has other inputs already");
    }
    if ((of_lora || of_model) && !r.control_image) {
        const int64_t plain = 4 * pipeline_->latent_format().channels, more = of_lora ? loras_.control_inputs() : plain;
        fail(Status::bad_argument, "%s takes %lld input features, where the plain model has %lld: it needs a control_image, a "
             "picture of edges or depths to follow", of_lora ? "a control LoRA that is in force" : "this model",
             static_cast<long long>(plain + more), static_cast<long long>(plain));
    }
    if (of_lora && r.reference_image) {
        fail(Status::bad_argument, "a control LoRA is in force, whose inputs a reference_image does not have; leave one of them out");
    }
    if (r.control_image && !of_lora && !of_model) {
        fail(Status::bad_argument, "a control_image was given, but neither the model nor a LoRA in force looks at one");
    }
}

// LoRAs that were distilled for a few steps paint burnt pictures with the usual settings, and seem broken.
void Context::hint_at_settings(const Request & r) {
    for (const std::vector<LoraUse> & uses : loras_.state().images) {
        for (const LoraUse & use : uses) {
            const auto settings = settings_of_lora(use.path, *pipeline_);
            const bool fits = !settings || use.unet == 0 ||
                              (r.steps <= 2 * settings->steps && (r.cfg_scale <= 2 * settings->cfg_scale) &&
                               std::abs(use.unet) <= 2 * settings->multiplier);
            if (log_ && !fits && hinted_.insert(use.path).second) {
                log_(Level::warning, text("%s: by its name %s; this picture has steps %d, cfg_scale %g and multiplier %g",
                                          use.path.c_str(), settings->sentence.c_str(), r.steps,
                                          static_cast<double>(r.cfg_scale), use.unet));
            }
        }
    }
}

// ---- what to paint -------------------------------------------------------------------------------------

Conditioning Context::encode_prompt(const Prompt & prompt, size_t image, int clip_skip, int chunks) {
    const std::string loras = loras_.text_identity(image);
    for (auto at = encoded_.begin(); at != encoded_.end(); ++at) {
        if (at->clip_skip == clip_skip && at->chunks == chunks && at->loras == loras && same(at->prompt, prompt)) {
            encoded_.splice(encoded_.begin(), encoded_, at);
            return encoded_.front().conditioning;
        }
    }
    runner_.adapt(loras_.adapters(), loras_.text_strengths(image));
    encoded_.push_front({prompt, loras, clip_skip, chunks, pipeline_->encode(runner_, prompt, clip_skip, chunks)});
    if (encoded_.size() > kept_conditionings) {
        encoded_.pop_back();
    }
    return encoded_.front().conditioning;
}

// Puts one image's inputs behind those of the images before it.
static void append_image(Conditioning & all, const Conditioning & one) {
    for (const auto & [name, tensor] : one.tokens) {
        Tensor & joined = all.tokens[name];
        joined.ne = {tensor.ne[0], tensor.ne[1], joined.data.empty() ? 1 : joined.ne[2] + 1, 1};
        append(joined.data, tensor.data);
    }
    for (const auto & [name, tensor] : one.vectors) {
        Tensor & joined = all.vectors[name];
        joined.ne = {tensor.ne[0], joined.data.empty() ? 1 : joined.ne[1] + 1, 1, 1};
        append(joined.data, tensor.data);
    }
}

void Context::warn_unread(const Request & request, bool guided) const {
    std::set<std::string> told;
    for (const auto * prompts : {&request.prompts, &request.negative_prompts}) {
        for (size_t i = 0; log_ && i < prompts->size() && (guided || prompts == &request.prompts); ++i) {
            const std::string unread = pipeline_->unread((*prompts)[i]);
            if (!unread.empty() && told.insert(unread).second) {
                log_(Level::warning, unread);
            }
        }
    }
}

// One conditioning per image of the batch, then, where guided, the negative one of each.
Conditioning Context::condition(const Request & request, bool guided) {
    std::vector<const Prompt *> prompts;
    const auto                  add = [&](const std::vector<Prompt> & from) {
        for (int image = 0; image < request.batch_size; ++image) {
            prompts.push_back(&from[from.size() > 1 ? image : 0]);
        }
    };
    add(request.prompts);
    if (guided) {
        add(request.negative_prompts);
    }
    int chunks = 1;
    for (const Prompt * prompt : prompts) {
        chunks = std::max(chunks, pipeline_->count_chunks(*prompt));
    }
    if (chunks > max_chunks) {
        fail(Status::bad_argument, "a prompt fills %d chunks of tokens, where %d are the most that are read; make it shorter",
             chunks, max_chunks);
    }
    const Conditioning picture = pipeline_->describe(request.sizes), negative = pipeline_->describe(request.negative_sizes);
    Conditioning       all;
    for (size_t i = 0; i < prompts.size(); ++i) {
        const size_t image = i % request.batch_size;
        append_image(all, encode_prompt(*prompts[i], image, request.clip_skip, chunks));
        append_image(all, i < static_cast<size_t>(request.batch_size) ? picture : negative);
    }
    append_redux(request, all);
    return all;
}

// Behind the text of each run, the unguided ones too, for all have as many tokens.
void Context::append_redux(const Request & r, Conditioning & all) {
    if (!r.redux_image) {
        return;
    }
    const int    side = pipeline_->redux_size();
    const Tensor image = image_from_rgb(r.redux_image, side, side);
    runner_.adapt(nullptr);
    auto           outputs = runner_.run("redux", {{"image", &image}}, [&](Graph & g) { g.output("tokens", pipeline_->look_at(g)); });
    const Tensor & seen = outputs.at("tokens");
    const Tensor & text = all.tokens.at("text");
    const size_t   of_text = static_cast<size_t>(text.ne[0] * text.ne[1]);
    Tensor         joined({text.ne[0], text.ne[1] + seen.ne[1], text.ne[2], 1});
    float *        to = joined.data.data();
    for (int64_t run = 0; run < text.ne[2]; ++run) {
        to = std::copy_n(text.data.begin() + run * static_cast<int64_t>(of_text), of_text, to);
        to = std::transform(seen.data.begin(), seen.data.end(), to, [&](float value) { return value * r.redux_strength; });
    }
    all.tokens["text"] = std::move(joined);
}

// ---- where to begin ------------------------------------------------------------------------------------

// The mean of the picture's latent as the denoiser scales it; the autoencoder's own noise is left out.
Tensor Context::encode_picture(const std::vector<float> & rgb, int width, int height, int tile) {
    const LatentFormat format = pipeline_->latent_format();
    Tensor             image({width, height, 3, 1});
    image.data = rgb;
    const Tensor moments = in_tiles(image, tile > 0 ? tile : std::max(width, height), 1, format.reduction, [&](const Tensor & part) {
        return runner_
            .run("vae_encode", {{"image", &part}}, [&](Graph & g) { g.output("moments", pipeline_->encode_image(g)); })
            .at("moments");
    });
    Tensor latent({moments.ne[0], moments.ne[1], format.channels, 1});
    for (size_t i = 0; i < latent.data.size(); ++i) {
        latent.data[i] = (moments.data[i] - format.shift) * format.scale;
    }
    return latent;
}

static int tile_for(const Request & r, int width, int height) {
    const bool whole = static_cast<int64_t>(width) * height <= whole_picture;
    return r.vae_tile > 0 ? r.vae_tile : whole ? 0 : auto_tile;
}

static int tile_for(const Request & r) { return tile_for(r, r.width, r.height); }

// The latent of the picture to look at, as often as the denoiser runs at once.
std::optional<Tensor> Context::encode_reference(const Request & r, int runs) {
    if (!r.reference_image) {
        return std::nullopt;
    }
    const int    width = r.reference_width, height = r.reference_height;
    const Tensor one = encode_picture(image_from_rgb(r.reference_image, width, height).data, width, height,
                                      tile_for(r, width, height));
    Tensor       out({one.ne[0], one.ne[1], one.ne[2], runs});
    for (int run = 0; run < runs; ++run) {
        std::copy(one.data.begin(), one.data.end(), out.data.begin() + run * static_cast<int64_t>(one.data.size()));
    }
    return out;
}

Context::Latents Context::start(const Request & r) {
    const LatentFormat format = pipeline_->latent_format();
    const int64_t      w = r.width / format.reduction, h = r.height / format.reduction;
    Latents            out{{w, h, format.channels, r.batch_size}, {}, {}, {}};

    std::vector<float> picture;
    if (r.init_image) {
        picture = image_from_rgb(r.init_image, r.width, r.height).data;
        out.init = encode_picture(picture, r.width, r.height, tile_for(r));
    }
    // A Fill model sees what is around the mask, and was trained to paint all of the picture.
    if (r.mask && pipeline_->extra_input() != ExtraInput::fill) {
        out.mask = latent_mask(r.mask, r.width, r.height, format.reduction);
    }
    out.extra = extra_channels(r, std::move(picture), out.mask);
    return out;
}

// What the denoiser sees behind the latent's own channels, in the order of ExtraInput: [w, h, C, 1].
std::optional<Tensor> Context::extra_channels(const Request & r, std::vector<float> picture,
                                              const std::optional<Tensor> & mask) {
    const int64_t         side = pipeline_->latent_format().reduction, plane = static_cast<int64_t>(r.width) * r.height;
    const int64_t         w = r.width / side, h = r.height / side;
    std::optional<Tensor> out;
    const auto            add = [&](const std::vector<float> & values) {
        out = out ? out : Tensor({w, h, 0, 1});
        out->ne[2] += static_cast<int64_t>(values.size()) / (w * h);
        append(out->data, values);
    };
    const auto add_latent = [&](const std::vector<float> & rgb) {
        add(encode_picture(rgb, r.width, r.height, tile_for(r)).data);
    };
    const auto is_repainted = [&](int64_t pixel) { return !r.mask || r.mask[pixel] >= 128; };
    const auto hide = [&] { // under grey, what is to be repainted
        picture.resize(static_cast<size_t>(3 * plane), 0.0f);
        for (int64_t i = 0; i < 3 * plane; ++i) {
            picture[i] = is_repainted(i % plane) ? 0.0f : picture[i];
        }
    };
    switch (pipeline_->extra_input()) {
    case ExtraInput::none:
    case ExtraInput::control:
        break;
    case ExtraInput::pix2pix:
        fail(Status::unsupported, "this is an InstructPix2Pix model (%d input channels); only its text encoder and "
             "autoencoder can be used so far", pipeline_->input_channels());
    case ExtraInput::inpainting: {
        std::vector<float> cells(static_cast<size_t>(w * h), 1.0f);
        for (size_t i = 0; mask && i < cells.size(); ++i) {
            cells[i] = mask->data[i] >= 0.5f ? 1.0f : 0.0f;
        }
        hide();
        add(cells);
        add_latent(picture);
        break;
    }
    case ExtraInput::fill: {
        std::vector<float> pixels(static_cast<size_t>(plane));
        for (int64_t i = 0; i < plane; ++i) {
            const int64_t x = i % r.width, y = i / r.width, channel = y % side * side + x % side;
            pixels[(channel * h + y / side) * w + x / side] = is_repainted(i) ? 1.0f : 0.0f;
        }
        hide();
        add_latent(picture);
        add(pixels);
        break;
    }
    }
    if (r.control_image) {
        add_latent(image_from_rgb(r.control_image, r.width, r.height).data);
    }
    return out;
}

// ---- painting ------------------------------------------------------------------------------------------

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

void Context::paint(const Request & r, uint8_t * rgb) {
    runner_.adapt(nullptr);
    const bool          guided = r.cfg_scale != 1.0f;
    const Latents       begin = start(r);
    const NoiseSchedule trained = pipeline_->noise_schedule(begin.ne, r.shift);
    std::vector<float>  sigmas = make_sigmas(r.scheduler, trained, r.steps);
    warn_unread(r, guided);
    const Conditioning  conditioning = condition(r, guided);

    if (begin.init) { // a weaker change begins further down
        const auto steps = static_cast<int64_t>(sigmas.size()) - 1;
        const auto kept = std::min(steps, static_cast<int64_t>(static_cast<double>(steps) * r.strength));
        sigmas.erase(sigmas.begin(), sigmas.begin() + (steps - kept));
    }

    const Prediction prediction = pipeline_->prediction();
    const auto       kept_at = [&](float sigma) { return prediction == Prediction::flow ? 1 - sigma : 1.0f; };

    const size_t                      one = static_cast<size_t>(count(begin.ne)) / r.batch_size;
    const size_t                      plane = static_cast<size_t>(begin.ne[0] * begin.ne[1]);
    std::vector<std::unique_ptr<Rng>> rngs;
    std::vector<float>                x(one * r.batch_size);
    for (int image = 0; image < r.batch_size; ++image) {
        rngs.push_back(make_rng(r.rng, r.seed + image));
        float * at = x.data() + image * one;
        rngs.back()->normal(at, one);
        for (size_t i = 0; i < one; ++i) {
            at[i] = at[i] * sigmas.front() + (begin.init ? begin.init->data[i] * kept_at(sigmas.front()) : 0.0f);
        }
    }

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
    const int          pixels = tile_for(r);
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

// ---- questions -----------------------------------------------------------------------------------------

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
    LoraFile   file = read_lora(lora, lora_names_, written(*family_));
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
