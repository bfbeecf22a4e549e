#include "context.h"
#include "loras.h"

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>

namespace binding {

namespace {

using Span = std::pair<std::optional<std::string>, float>; // no text: BREAK
using Spans = std::vector<Span>;
using ToldSizes = std::array<int, 6>; // as sd_sizes
using LoraLists = std::vector<std::vector<py::dict>>; // per prompt

// What on_step is given to look at the picture so far; dead outside of the call.
class Preview {
  public:
    Preview(sd_ctx * ctx, int width, int height, int images)
        : ctx_(ctx), width_(width), height_(height), images_(images) {}

    void end() { ctx_ = nullptr; }

    Bytes operator()(int image) const {
        if (!ctx_) {
            raise(SD_BAD_ARGUMENT,
                  py::str("preview: can be called only while on_step runs; keep the array that it returned"));
        }
        if (image < 0 || image >= images_ || width_ < 1 || height_ < 1) {
            raise(SD_BAD_ARGUMENT,
                  py::str("preview: there is no image {}; this batch has {}").format(image, images_));
        }
        Bytes rgb({height_, width_, 3});
        check(sd_preview(ctx_, image, rgb.mutable_data()));
        return rgb;
    }

  private:
    sd_ctx * ctx_;
    int width_, height_, images_;
};

// The callbacks of one run.
struct Run {
    sd_ctx * ctx;
    Raised & while_logging;
    py::object on_step; // or None
    int preview_width, preview_height, images;
    Raised raised;

    static bool step(int step, int steps, void * user) {
        Run & run = *static_cast<Run *>(user);
        return run.raised.guard([&] {
            const auto preview =
                std::make_shared<Preview>(run.ctx, run.preview_width, run.preview_height, run.images);
            const std::unique_ptr<Preview, void (*)(Preview *)> end(preview.get(),
                                                                    [](Preview * p) { p->end(); });
            const py::object answer = run.on_step(step, steps, preview);
            return answer.is_none() || py::bool_(answer);
        });
    }

    static bool keep_going(void * user) {
        Run & run = *static_cast<Run *>(user);
        return run.raised.guard([&] {
            run.while_logging.rethrow();
            if (PyErr_CheckSignals() != 0) { // Ctrl-C
                throw py::error_already_set();
            }
            return true;
        });
    }
};

// Prompts in the form that C wants; points into the spans and LoRAs that it was made from.
class Prompts {
  public:
    Prompts(const std::vector<Spans> & all, const char * argument, const LoraLists & loras) {
        for (const std::vector<py::dict> & of_prompt : loras) {
            loras_.push_back(std::make_unique<Loras>(of_prompt));
        }
        for (const Spans & spans : all) {
            std::vector<sd_span> & out = spans_.emplace_back();
            for (const auto & [words, weight] : spans) {
                out.push_back({c_text(words, argument), weight});
            }
        }
        for (size_t i = 0; i < spans_.size(); i++) {
            sd_prompt prompt{spans_[i].data(), static_cast<int>(spans_[i].size()), nullptr, 0};
            if (i < loras_.size()) {
                prompt.loras = loras_[i]->data();
                prompt.n_loras = loras_[i]->size();
            }
            prompts_.push_back(prompt);
        }
    }

    const sd_prompt * data() const { return prompts_.data(); }
    int size() const { return static_cast<int>(prompts_.size()); }

  private:
    std::vector<std::unique_ptr<Loras>> loras_; // does not move what C points at
    std::vector<std::vector<sd_span>> spans_;
    std::vector<sd_prompt> prompts_;
};

sd_sizes to_sizes(const ToldSizes & from) { return {from[0], from[1], from[2], from[3], from[4], from[5]}; }

// Height, width, and channels where there are some, as the request has them; null where there is no picture.
const uint8_t * pixels(const std::optional<Bytes> & picture, const char * argument, int width, int height,
                       int channels) {
    if (!picture) {
        return nullptr;
    }
    Sizes want{height, width};
    if (channels > 1) {
        want.push_back(channels);
    }
    const Sizes have(picture->shape(), picture->shape() + picture->ndim());
    if (have != want) {
        raise(SD_BAD_ARGUMENT, py::str("{}: has shape {}, and the picture to paint {}")
                                   .format(argument, py::tuple(py::cast(have)), py::tuple(py::cast(want))));
    }
    return picture->data();
}

// Room for what is painted; the library judges the numbers later.
Bytes picture(int images, int height, int width) {
    try {
        return Bytes(Sizes{std::max(images, 1), std::max(height, 1), std::max(width, 1), 3});
    } catch (py::error_already_set & error) {
        if (!error.matches(PyExc_MemoryError) && !error.matches(PyExc_ValueError)) {
            throw;
        }
        raise(SD_OUT_OF_MEMORY, py::str("{} images of {} x {} pixels: there is not so much memory")
                                    .format(images, width, height));
    }
}

Bytes generate(const Context & context, const std::vector<Spans> & prompts,
               const std::vector<Spans> & negative_prompts, int width, int height, int steps, float cfg_scale,
               uint64_t seed, int batch_size, const Name & sampler, const Name & scheduler, const Name & rng,
               float eta, int clip_skip, const std::optional<Bytes> & init_image, float strength,
               const std::optional<Bytes> & mask, int vae_tile, const py::object & on_step,
               const LoraLists & loras, float guidance, float shift, const std::optional<Bytes> & control_image,
               const std::optional<Bytes> & reference_image, const std::optional<Bytes> & redux_image,
               float redux_strength, float guidance_rescale, const ToldSizes & sizes,
               const ToldSizes & negative_sizes) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    const Prompts wanted(prompts, "prompt", loras), unwanted(negative_prompts, "negative_prompt", {});
    const int cell = std::max(1, sd_get_model_info(ctx.get()).latent_cell);
    Run run{ctx.get(), context.while_logging(), on_step, width / cell, height / cell, batch_size, {}};

    sd_request request = sd_default_request(ctx.get());
    request.prompts = wanted.data();
    request.n_prompts = wanted.size();
    request.negative_prompts = unwanted.data();
    request.n_negative_prompts = unwanted.size();
    request.width = width;
    request.height = height;
    request.steps = steps;
    request.cfg_scale = cfg_scale;
    request.guidance_rescale = guidance_rescale;
    request.sizes = to_sizes(sizes);
    request.negative_sizes = to_sizes(negative_sizes);
    request.guidance = guidance;
    request.shift = shift;
    request.seed = seed;
    request.batch_size = batch_size;
    request.sampler = c_text(sampler, "sampler");
    request.scheduler = c_text(scheduler, "scheduler");
    request.rng = c_text(rng, "rng");
    request.eta = eta;
    request.clip_skip = clip_skip;
    request.init_image = pixels(init_image, "init_image", width, height, 3);
    request.strength = strength;
    request.mask = pixels(mask, "mask", width, height, 1);
    request.control_image = pixels(control_image, "control_image", width, height, 3);
    if (reference_image && reference_image->ndim() == 3) { // of any size
        request.reference_height = static_cast<int>(reference_image->shape(0));
        request.reference_width = static_cast<int>(reference_image->shape(1));
    }
    request.reference_image =
        pixels(reference_image, "reference_image", request.reference_width, request.reference_height, 3);
    const int side = sd_get_model_info(ctx.get()).redux_size;
    request.redux_image = side > 0      ? pixels(redux_image, "redux_image", side, side, 3)
                          : redux_image ? redux_image->data()
                                        : nullptr;
    request.redux_strength = redux_strength;
    request.vae_tile = vae_tile;
    request.on_step = on_step.is_none() ? nullptr : Run::step;
    request.keep_going = Run::keep_going;
    request.user = &run;

    Bytes rgb = picture(batch_size, height, width);
    uint8_t * out = rgb.mutable_data();
    const sd_status status = released([&] { return sd_generate(ctx.get(), &request, out); });
    run.raised.rethrow();
    context.while_logging().rethrow();
    check(status);
    return rgb;
}

// The most at a time, and of each network its name and the bytes of weights and of activations.
py::tuple estimate_memory(const Context & context, int width, int height, int batch_size, float cfg_scale, int vae_tile) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    const Prompts empty({{}}, "prompt", {});
    sd_request request = sd_default_request(ctx.get());
    request.prompts = request.negative_prompts = empty.data();
    request.n_prompts = request.n_negative_prompts = 1;
    request.width = width;
    request.height = height;
    request.batch_size = batch_size;
    request.cfg_scale = cfg_scale;
    request.vae_tile = vae_tile;
    size_t peak = 0;
    std::vector<std::tuple<std::string, size_t, size_t>> networks;
    const auto add = [](const sd_network_memory * memory, void * user) {
        static_cast<decltype(networks) *>(user)->emplace_back(memory->network, memory->weights, memory->activations);
        return true;
    };
    check(released([&] { return sd_estimate_memory(ctx.get(), &request, &peak, add, &networks); }));
    return py::make_tuple(peak, networks);
}

} // namespace

void bind_generate(py::module_ & m, ContextClass & context) {
    py::class_<Preview, std::shared_ptr<Preview>>(m, "Preview")
        .def("__call__", &Preview::operator(), "image"_a = 0);

    context.def("estimate_memory", estimate_memory, py::kw_only(), "width"_a, "height"_a, "batch_size"_a, "cfg_scale"_a,
                "vae_tile"_a);
    context.def("generate", generate, py::kw_only(), "prompts"_a, "negative_prompts"_a, "width"_a, "height"_a,
                "steps"_a, "cfg_scale"_a, "seed"_a, "batch_size"_a, "sampler"_a, "scheduler"_a, "rng"_a,
                "eta"_a, "clip_skip"_a, "init_image"_a, "strength"_a, "mask"_a, "vae_tile"_a, "on_step"_a,
                "loras"_a = LoraLists(), "guidance"_a = -1.0F, "shift"_a = 0.0F, "control_image"_a = py::none(),
                "reference_image"_a = py::none(), "redux_image"_a = py::none(), "redux_strength"_a = 1.0F,
                "guidance_rescale"_a = 0.0F, "sizes"_a = ToldSizes{0, 0, -1, -1, 0, 0},
                "negative_sizes"_a = ToldSizes{0, 0, -1, -1, 0, 0});
}

} // namespace binding
