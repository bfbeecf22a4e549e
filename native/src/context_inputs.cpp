// What the denoiser is told, and the latents that painting begins with.
#include "context.h"

#include "core/error.h"
#include "pixels.h"
#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace sd {
namespace {

constexpr size_t kept_conditionings = 16;
constexpr int    max_chunks = 256; // of a prompt: 19,200 tokens of CLIP
constexpr int    auto_tile = 512;  // pixels
constexpr int64_t whole_picture = 1024 * 1024; // pixels that go through the autoencoder without tiles

bool same(const Prompt & a, const Prompt & b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Span & x, const Span & y) {
        return x.text == y.text && x.weight == y.weight && x.is_break == y.is_break;
    });
}

void append(std::vector<float> & to, const std::vector<float> & from) { to.insert(to.end(), from.begin(), from.end()); }

} // namespace

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

int Context::tile_for(const Request & r, int width, int height) {
    const bool whole = static_cast<int64_t>(width) * height <= whole_picture;
    return r.vae_tile > 0 ? r.vae_tile : whole ? 0 : auto_tile;
}

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
        out.init = encode_picture(picture, r.width, r.height, tile_for(r, r.width, r.height));
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
        add(encode_picture(rgb, r.width, r.height, tile_for(r, r.width, r.height)).data);
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

} // namespace sd
