// `_native`: the C header as Python sees it. Nothing is decided here: arguments are checked and completed by
// context.py and by the library; this file turns numpy into pointers and statuses into exceptions.
#include "sdcpp.h"
#include "sdcpp_probe.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Span = std::pair<std::optional<std::string>, float>; // no text: BREAK
using Spans = std::vector<Span>;
using Name = std::optional<std::string>;
using Sizes = std::vector<py::ssize_t>; // in numpy's order
using LoraLists = std::vector<std::vector<py::dict>>; // per prompt

py::str text(const char * utf8) {
    const char * given = utf8 ? utf8 : "";
    return py::reinterpret_steal<py::str>(
        PyUnicode_DecodeUTF8(given, static_cast<Py_ssize_t>(std::strlen(given)), "replace"));
}

py::object text_or_none(const char * utf8) { return utf8 ? py::object(text(utf8)) : py::none(); }

[[noreturn]] void raise(sd_status status, const py::str & message) {
    const py::object exception =
        py::module_::import("sdcpp_py.errors").attr("from_status")(static_cast<int>(status), message);
    PyErr_SetObject(py::type::of(exception).ptr(), exception.ptr());
    throw py::error_already_set();
}

// The one place where a status becomes an exception.
void check(sd_status status) {
    if (status != SD_OK) {
        raise(status, text(sd_last_error()));
    }
}

// A string as C takes it: it has no byte 0.
const char * c_text(const std::string & value, const char * argument) {
    if (value.find('\0') != std::string::npos) {
        raise(SD_BAD_ARGUMENT,
              py::str("{}: has a NUL character at byte {}; take it out").format(argument, value.find('\0')));
    }
    return value.c_str();
}

const char * c_text(const Name & value, const char * argument) {
    return value ? c_text(*value, argument) : nullptr;
}

// What a callback raised waits here until the C frames between it and Python are gone.
class Raised {
  public:
    // Calls `work` with the GIL held; false where it raised, now or before.
    template <class Work>
    bool guard(Work && work) {
        const py::gil_scoped_acquire gil;
        if (raised_) {
            return false;
        }
        try {
            return work();
        } catch (...) {
            raised_ = std::current_exception();
            return false;
        }
    }

    void rethrow() {
        if (raised_) {
            std::rethrow_exception(std::exchange(raised_, nullptr));
        }
    }

  private:
    std::exception_ptr raised_;
};

// A handler that fails costs its message; Ctrl-C, which Python may deliver here, is kept in `user`, a Raised.
void log_to_python(sd_log_level level, const char * message, void * user) {
    static constexpr int levels[] = {10, 20, 30, 40}; // logging.DEBUG to logging.ERROR
    static_cast<Raised *>(user)->guard([&] {
        try {
            const py::object logger = py::module_::import("logging").attr("getLogger")("sdcpp_py");
            logger.attr("log")(levels[std::clamp(static_cast<int>(level), 0, 3)], "%s", text(message));
        } catch (py::error_already_set & error) {
            if (!error.matches(PyExc_Exception)) {
                throw;
            }
            error.discard_as_unraisable("sdcpp_py: a log message");
        }
        return true;
    });
}

// ---- painting ------------------------------------------------------------------------------------------

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

// LoRAs in the form that C wants. Each comes as a dict: path, te, unet, start, stop, blocks.
class Loras {
  public:
    explicit Loras(const std::vector<py::dict> & all) {
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
            loras_.push_back({c_text(paths_[i], "path"), number("te"), number("unet"), number("start"),
                              number("stop"), blocks.data(), static_cast<int>(blocks.size())});
        }
    }

    const sd_lora * data() const { return loras_.data(); }
    int size() const { return static_cast<int>(loras_.size()); }

  private:
    std::vector<std::string> paths_;
    std::vector<std::vector<std::pair<std::string, double>>> prefixes_;
    std::vector<std::vector<sd_lora_block>> blocks_;
    std::vector<sd_lora> loras_;
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

// pybind11 can't hold an incomplete type, so the handle travels in this. A call in another thread keeps the
// model alive until it is through.
class Context {
  public:
    Context(const std::string & model, const std::map<std::string, std::string> & components,
            const std::string & data_dir, const Name & backend, int threads, const Name & prediction,
            const Name & lora_mode, const Name & base_copy, bool requantise, bool strict_loras, size_t lora_cache) {
        std::vector<sd_component> parts;
        for (const auto & [role, path] : components) {
            parts.push_back({c_text(role, "components"), c_text(path, role.c_str())});
        }
        sd_open_params params = sd_default_open_params();
        params.model = c_text(model, "model");
        params.components = parts.data();
        params.n_components = static_cast<int>(parts.size());
        params.data_dir = c_text(data_dir, "data_dir");
        params.backend = c_text(backend, "backend");
        params.threads = threads;
        params.prediction = c_text(prediction, "prediction");
        params.lora_mode = c_text(lora_mode, "lora_mode");
        params.base_copy = c_text(base_copy, "base_copy");
        params.requantise = requantise;
        params.strict_loras = strict_loras;
        params.lora_cache = lora_cache;
        params.log = log_to_python;
        params.log_user = while_logging_.get();

        sd_ctx * ctx = nullptr;
        sd_status status;
        {
            const py::gil_scoped_release release;
            status = sd_open(&params, &ctx);
        }
        if (ctx) {
            handle_ = std::shared_ptr<sd_ctx>(ctx, [log_user = while_logging_](sd_ctx * last) {
                const py::gil_scoped_release release; // closing may log
                sd_close(last);
            });
        }
        while_logging_->rethrow();
        check(status);
    }

    void close() { handle_.reset(); }

    bool closed() const { return !handle_; }

    std::shared_ptr<sd_ctx> handle() const {
        if (!handle_) {
            raise(SD_BAD_ARGUMENT, py::str("this context is closed; open another"));
        }
        return handle_;
    }

    Bytes generate(const std::vector<Spans> & prompts, const std::vector<Spans> & negative_prompts, int width,
                   int height, int steps, float cfg_scale, uint64_t seed, int batch_size,
                   const Name & sampler, const Name & scheduler, const Name & rng, float eta, int clip_skip,
                   const std::optional<Bytes> & init_image, float strength, const std::optional<Bytes> & mask,
                   int vae_tile, const py::object & on_step, const LoraLists & loras) const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        const Prompts wanted(prompts, "prompt", loras), unwanted(negative_prompts, "negative_prompt", {});
        const int cell = std::max(1, sd_get_model_info(ctx.get()).latent_cell);
        Run run{ctx.get(), *while_logging_, on_step, width / cell, height / cell, batch_size, {}};

        sd_request request = sd_default_request(ctx.get());
        request.prompts = wanted.data();
        request.n_prompts = wanted.size();
        request.negative_prompts = unwanted.data();
        request.n_negative_prompts = unwanted.size();
        request.width = width;
        request.height = height;
        request.steps = steps;
        request.cfg_scale = cfg_scale;
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
        request.vae_tile = vae_tile;
        request.on_step = on_step.is_none() ? nullptr : Run::step;
        request.keep_going = Run::keep_going;
        request.user = &run;

        Bytes rgb = picture(batch_size, height, width);
        uint8_t * out = rgb.mutable_data();
        sd_status status;
        {
            const py::gil_scoped_release release;
            status = sd_generate(ctx.get(), &request, out);
        }
        run.raised.rethrow();
        while_logging_->rethrow();
        check(status);
        return rgb;
    }

    py::dict info() const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        const sd_model_info info = sd_get_model_info(ctx.get());
        return py::dict("family"_a = text(info.family), "prediction"_a = text(info.prediction),
                        "backend"_a = text(info.backend), "threads"_a = info.threads,
                        "size_multiple"_a = info.size_multiple, "native_size"_a = info.native_size,
                        "latent_channels"_a = info.latent_channels, "latent_cell"_a = info.latent_cell,
                        "input_channels"_a = info.input_channels, "weight_bytes"_a = info.weight_bytes,
                        "n_weights"_a = info.n_weights);
    }

    py::dict defaults() const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        const sd_request request = sd_default_request(ctx.get());
        return py::dict("width"_a = request.width, "height"_a = request.height, "steps"_a = request.steps,
                        "cfg_scale"_a = request.cfg_scale, "sampler"_a = text_or_none(request.sampler),
                        "scheduler"_a = text_or_none(request.scheduler), "rng"_a = text_or_none(request.rng),
                        "eta"_a = request.eta, "clip_skip"_a = request.clip_skip,
                        "strength"_a = request.strength, "vae_tile"_a = request.vae_tile);
    }

    std::string fingerprint() const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        char hex[65];
        sd_status status;
        {
            const py::gil_scoped_release release;
            status = sd_fingerprint(ctx.get(), hex);
        }
        check(status);
        return hex;
    }

    void apply_loras(const std::vector<py::dict> & loras) const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        const Loras wanted(loras);
        sd_status status;
        {
            const py::gil_scoped_release release;
            status = sd_apply_loras(ctx.get(), wanted.data(), wanted.size());
        }
        check(status);
    }

    void reset_loras() const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        sd_status status;
        {
            const py::gil_scoped_release release;
            status = sd_reset_loras(ctx.get());
        }
        check(status);
    }

    // (path, text, unet, start, stop) of each that acts on an image.
    py::list lora_state(int image) const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        py::list out;
        sd_lora lora;
        for (int i = 0; sd_get_lora(ctx.get(), image, i, &lora); i++) {
            out.append(py::make_tuple(text(lora.path), lora.text, lora.unet, lora.start, lora.stop));
        }
        return out;
    }

    py::list lora_reports() const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        py::list out;
        for (int i = 0; const char * json = sd_lora_report(ctx.get(), i); i++) {
            out.append(text(json));
        }
        return out;
    }

    py::str inspect_lora(const std::string & path) const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        const char * json = nullptr;
        check(sd_inspect_lora(ctx.get(), c_text(path, "path"), &json));
        return text(json);
    }

    double lora_drift() const {
        const std::shared_ptr<sd_ctx> ctx = handle();
        double drift = 0;
        check(sd_lora_drift(ctx.get(), &drift));
        return drift;
    }

    int count_tokens(const std::string & words) const {
        int count = 0;
        check(sd_count_tokens(handle().get(), c_text(words, "text"), &count));
        return count;
    }

  private:
    std::shared_ptr<Raised> while_logging_ = std::make_shared<Raised>();
    std::shared_ptr<sd_ctx> handle_;
};

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
    return out;
}

// ---- the probe -----------------------------------------------------------------------------------------

// Collects what a probe gives.
struct Result {
    std::vector<float> data;
    Sizes shape; // numpy's order, 4 dimensions

    static void receive(const sd_tensor * tensor, void * user) {
        Result & result = *static_cast<Result *>(user);
        result.shape.assign(std::rbegin(tensor->ne), std::rend(tensor->ne));
        int64_t n = 1;
        for (const int64_t size : tensor->ne) {
            n *= size;
        }
        result.data.assign(tensor->data, tensor->data + n);
    }

    Floats array() const { return Floats(shape, data.data()); }
    Floats flat() const { return Floats(static_cast<py::ssize_t>(data.size()), data.data()); }
};

Floats probe_run(const Context & context, const std::string & network, const py::kwargs & arrays) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    std::vector<std::string> keys;
    std::vector<Floats> values; // keep what `inputs` points at
    for (const auto & [key, value] : arrays) {
        keys.push_back(key.cast<std::string>());
        values.push_back(value.cast<Floats>());
    }
    std::vector<sd_tensor> inputs;
    for (size_t i = 0; i < keys.size(); i++) {
        Floats & value = values[i];
        if (value.ndim() > 4) {
            raise(SD_BAD_ARGUMENT,
                  py::str("{}: has {} dimensions; the most is 4").format(keys[i], value.ndim()));
        }
        sd_tensor input{keys[i].c_str(), {1, 1, 1, 1}, const_cast<float *>(value.data())};
        std::reverse_copy(value.shape(), value.shape() + value.ndim(), input.ne);
        inputs.push_back(input);
    }
    const char * name = c_text(network, "network");
    Result result;
    sd_status status;
    {
        const py::gil_scoped_release release;
        status = sd_probe_run(ctx.get(), name, inputs.data(), static_cast<int>(inputs.size()),
                              Result::receive, &result);
    }
    check(status);
    return result.array();
}

Floats probe_latent(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    Result result;
    check(sd_probe_latent(ctx.get(), Result::receive, &result));
    return result.array();
}

// numpy's order, without the leading ones that C fills up with.
py::tuple numpy_shape(const int64_t (&ne)[4], int dims) { // dims < 0: not known
    if (dims < 0) {
        dims = 4;
        while (dims > 1 && ne[dims - 1] == 1) {
            dims--;
        }
    }
    dims = std::min(dims, 4);
    py::tuple shape(dims);
    for (int i = 0; i < dims; i++) {
        shape[static_cast<size_t>(i)] = ne[dims - 1 - i];
    }
    return shape;
}

// ---- weights in files ----------------------------------------------------------------------------------

py::list types() {
    py::list out;
    sd_type type;
    for (int i = 0; sd_get_type(i, &type); i++) {
        out.append(py::dict("name"_a = text(type.name), "number"_a = type.number, "block"_a = type.block,
                            "block_bytes"_a = type.block_bytes, "can_read"_a = type.can_read,
                            "can_write"_a = type.can_write, "wants_importance"_a = type.wants_importance));
    }
    return out;
}

// What a type takes; the library says which name it does not know.
sd_type type_named(const std::string & name) {
    sd_type type{};
    for (int i = 0; sd_get_type(i, &type); i++) {
        if (name == type.name) {
            return type;
        }
    }
    raise(SD_BAD_ARGUMENT, py::str("type {!r} is not known; 'q8_0', 'q4_K' and 'f16' are").format(name));
}

Bytes convert_rows(const std::string & from_type, const py::buffer & from, const std::string & to_type,
                   int64_t rows, int64_t row_length, const std::optional<Floats> & importance) {
    const sd_type source = type_named(from_type), target = type_named(to_type);
    const py::buffer_info in = from.request();
    const auto bytes = [&](const sd_type & type) {
        if (rows < 0 || row_length < 0 || row_length % type.block != 0) {
            raise(SD_BAD_ARGUMENT, py::str("{} rows of {} are no whole blocks of {}, which has {} in a block")
                                       .format(rows, row_length, type.name, type.block));
        }
        return rows * (row_length / type.block) * static_cast<int64_t>(type.block_bytes);
    };
    const int64_t have = in.size * in.itemsize, want = bytes(source);
    if (have != want || !PyBuffer_IsContiguous(in.view(), 'C')) {
        raise(SD_BAD_ARGUMENT, py::str("{} rows of {} take {} bytes as {}, not {}, side by side")
                                   .format(rows, row_length, want, source.name, have));
    }
    if (importance && importance->size() != row_length) {
        raise(SD_BAD_ARGUMENT, py::str("importance: has {} numbers for rows of {}").format(importance->size(), row_length));
    }
    Bytes out(Sizes{static_cast<py::ssize_t>(bytes(target))});
    uint8_t * to = out.mutable_data();
    const float * columns = importance ? importance->data() : nullptr;
    sd_status status;
    {
        const py::gil_scoped_release release;
        status = sd_convert_rows(source.name, in.ptr ? in.ptr : to, target.name, to, rows, row_length, columns);
    }
    check(status);
    return out;
}

using Components = std::map<std::string, std::string>;

std::vector<sd_component> c_components(const Components & components) {
    std::vector<sd_component> parts;
    for (const auto & [role, path] : components) {
        parts.push_back({c_text(role, "components"), c_text(path, role.c_str())});
    }
    return parts;
}

// ([(name, type, shape, dims, path, offset, bytes), ...], metadata)
py::tuple list_tensors(const std::string & model, const Components & components) {
    struct Call {
        py::list tensors;
        py::dict metadata;
        Raised raised;
    } call;
    const auto on_tensor = [](const sd_stored * tensor, void * user) {
        Call & self = *static_cast<Call *>(user);
        return self.raised.guard([&] {
            self.tensors.append(py::make_tuple(text(tensor->name), text(tensor->type), numpy_shape(tensor->ne, tensor->dims),
                                               tensor->dims, py::bytes(tensor->path), tensor->offset, tensor->bytes));
            return true;
        });
    };
    const auto on_metadata = [](const char * key, const char * value, void * user) {
        Call & self = *static_cast<Call *>(user);
        return self.raised.guard([&] {
            self.metadata[text(key)] = text(value);
            return true;
        });
    };
    const char * path = c_text(model, "model");
    const std::vector<sd_component> parts = c_components(components);
    sd_status status;
    {
        const py::gil_scoped_release release;
        status = sd_list_tensors(path, parts.data(), static_cast<int>(parts.size()), on_tensor, on_metadata, &call);
    }
    call.raised.rethrow();
    check(status);
    return py::make_tuple(call.tensors, call.metadata);
}

// (family, [{name, diffusers_name, shape, first_row, rows, swap_halves, table}, ...])
py::tuple list_weights(const std::string & model, const Components & components, const std::string & data_dir) {
    struct Call {
        py::list weights;
        Raised raised;
    } call;
    const auto on_weight = [](const sd_declared * weight, void * user) {
        Call & self = *static_cast<Call *>(user);
        return self.raised.guard([&] {
            self.weights.append(py::dict("name"_a = text(weight->name), "diffusers_name"_a = text(weight->diffusers_name),
                                         "shape"_a = numpy_shape(weight->ne, -1), "first_row"_a = weight->first_row,
                                         "rows"_a = weight->rows, "swap_halves"_a = weight->swap_halves,
                                         "table"_a = weight->table));
            return true;
        });
    };
    const std::vector<sd_component> parts = c_components(components);
    sd_open_params params = sd_default_open_params();
    params.model = c_text(model, "model");
    params.components = parts.data();
    params.n_components = static_cast<int>(parts.size());
    params.data_dir = c_text(data_dir, "data_dir");
    const char * family = "";
    sd_status status;
    {
        const py::gil_scoped_release release;
        status = sd_list_weights(&params, &family, on_weight, &call);
    }
    call.raised.rethrow();
    check(status);
    return py::make_tuple(text(family), call.weights);
}

// ---- probes --------------------------------------------------------------------------------------------

py::list probe_weights(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    py::list out;
    sd_weight_info info;
    for (int i = 0; sd_probe_weight(ctx.get(), i, &info); i++) {
        out.append(py::dict("name"_a = text(info.name), "diffusers_name"_a = text(info.diffusers_name),
                            "type"_a = text(info.type), "file_type"_a = text(info.file_type),
                            "shape"_a = numpy_shape(info.ne, -1)));
    }
    return out;
}

// Runs a probe that gives one row of numbers.
template <class Probe>
Floats row(Probe && probe) {
    Result result;
    sd_status status;
    {
        const py::gil_scoped_release release;
        status = probe(Result::receive, &result);
    }
    check(status);
    return result.flat();
}

py::array_t<int32_t> probe_clip_tokens(const std::string & merges_path, const std::string & words) {
    const char * path = c_text(merges_path, "merges_path");
    const char * utf8 = c_text(words, "text");
    const Floats ids =
        row([&](sd_receive receive, void * user) { return sd_probe_clip_tokens(path, utf8, receive, user); });
    py::array_t<int32_t> out(ids.size());
    std::transform(ids.data(), ids.data() + ids.size(), out.mutable_data(),
                   [](float id) { return static_cast<int32_t>(id); });
    return out;
}

Floats probe_noise(const std::string & rng, uint64_t seed, int64_t n) {
    const char * name = c_text(rng, "rng");
    return row([&](sd_receive receive, void * user) { return sd_probe_noise(name, seed, n, receive, user); });
}

Floats probe_sigmas(const std::string & scheduler, int steps) {
    const char * name = c_text(scheduler, "scheduler");
    return row([&](sd_receive receive, void * user) { return sd_probe_sigmas(name, steps, receive, user); });
}

// `x` holds one image per row of its first dimension; `denoise` gets an array of that shape.
Floats probe_sample(const std::string & sampler, const Floats & sigmas, const py::function & denoise,
                    const Floats & x, const std::string & rng, uint64_t seed, int64_t skip, float eta) {
    struct Call {
        const py::function & denoise;
        Sizes shape;
        Raised raised;
    } call{denoise, Sizes(x.shape(), x.shape() + x.ndim()), {}};
    if (call.shape.empty()) {
        raise(SD_BAD_ARGUMENT, py::str("x: is a single number; its first dimension counts images"));
    }
    const auto denoiser = [](const float * now, float sigma, float * denoised, int64_t n,
                             void * user) -> bool {
        Call & self = *static_cast<Call *>(user);
        return self.raised.guard([&] {
            const Floats answer = self.denoise(Floats(self.shape, now), sigma).template cast<Floats>();
            if (answer.size() != n) {
                raise(SD_BAD_ARGUMENT, py::str("denoise: gave {} numbers for {}").format(answer.size(), n));
            }
            std::copy_n(answer.data(), n, denoised);
            return true;
        });
    };
    const char * sampler_text = c_text(sampler, "sampler");
    const char * rng_text = c_text(rng, "rng");
    Floats out(call.shape, x.data());
    float * data = out.mutable_data();
    const int images = static_cast<int>(call.shape[0]);
    sd_status status;
    {
        const py::gil_scoped_release release;
        status = sd_probe_sample(sampler_text, sigmas.data(), static_cast<int>(sigmas.size()), rng_text, seed,
                                 skip, eta, data, out.size(), images, denoiser, &call);
    }
    call.raised.rethrow();
    check(status);
    return out;
}

// (name, type, shape, bytes) per tensor, or (name, type, shape, number of bytes) without data.
py::list probe_checkpoint(const std::string & path, bool data) {
    struct Call {
        py::list out;
        bool data;
        Raised raised;
    } call{py::list(), data, {}};
    const auto each = [](const char * name, const char * type, const int64_t ne[4], int dims,
                         const void * bytes, size_t n, void * user) {
        Call & self = *static_cast<Call *>(user);
        self.raised.guard([&] {
            int64_t shape[4];
            std::copy_n(ne, 4, shape);
            const py::object stored =
                self.data ? py::object(py::bytes(static_cast<const char *>(bytes), n)) : py::int_(n);
            self.out.append(py::make_tuple(text(name), text(type), numpy_shape(shape, dims), stored));
            return true;
        });
    };
    const char * file = c_text(path, "path");
    sd_status status;
    {
        const py::gil_scoped_release release;
        status = sd_probe_checkpoint(file, each, &call);
    }
    call.raised.rethrow();
    check(status);
    return call.out;
}

} // namespace

void bind_lora_files(py::module_ & m); // lora_files.cpp

PYBIND11_MODULE(_native, m) {
    m.doc() = "The engine of sdcpp_py, as sdcpp.h offers it. Use sdcpp_py.SDContext instead.";

    py::class_<Preview, std::shared_ptr<Preview>>(m, "Preview")
        .def("__call__", &Preview::operator(), "image"_a = 0);

    py::class_<Context>(m, "Context")
        .def(py::init<const std::string &, const std::map<std::string, std::string> &, const std::string &,
                      const Name &, int, const Name &, const Name &, const Name &, bool, bool, size_t>(),
             "model"_a, py::kw_only(), "components"_a = py::dict(), "data_dir"_a, "backend"_a = py::none(),
             "threads"_a = 0, "prediction"_a = py::none(), "lora_mode"_a = py::none(),
             "base_copy"_a = py::none(), "requantise"_a = false, "strict_loras"_a = false, "lora_cache"_a = 0)
        .def("close", &Context::close)
        .def_property_readonly("closed", &Context::closed)
        .def("info", &Context::info)
        .def("defaults", &Context::defaults)
        .def("fingerprint", &Context::fingerprint)
        .def("count_tokens", &Context::count_tokens, "text"_a)
        .def("generate", &Context::generate, py::kw_only(), "prompts"_a, "negative_prompts"_a, "width"_a,
             "height"_a, "steps"_a, "cfg_scale"_a, "seed"_a, "batch_size"_a, "sampler"_a, "scheduler"_a,
             "rng"_a, "eta"_a, "clip_skip"_a, "init_image"_a, "strength"_a, "mask"_a, "vae_tile"_a,
             "on_step"_a, "loras"_a = LoraLists())
        .def("apply_loras", &Context::apply_loras, "loras"_a)
        .def("reset_loras", &Context::reset_loras)
        .def("lora_state", &Context::lora_state, "image"_a = 0)
        .def("lora_reports", &Context::lora_reports)
        .def("inspect_lora", &Context::inspect_lora, "path"_a)
        .def("lora_drift", &Context::lora_drift);

    bind_lora_files(m);

    m.def("version", [] { return text(sd_version()); });
    m.def("build_info", [] { return text(sd_build_info()); });
    m.def("samplers", [] { return names(sd_sampler_name); });
    m.def("schedulers", [] { return names(sd_scheduler_name); });
    m.def("rngs", [] { return names(sd_rng_name); });
    m.def("families", [] { return names(sd_family_name); });
    m.def("devices", &devices);
    m.def(
        "add_rpc_devices",
        [](const std::string & endpoint) { check(sd_add_rpc_devices(c_text(endpoint, "endpoint"))); },
        "endpoint"_a);

    m.def("types", &types);
    m.def("convert_rows", &convert_rows, "from_type"_a, "data"_a, "to_type"_a, "rows"_a, "row_length"_a,
          "importance"_a = py::none());
    m.def("list_tensors", &list_tensors, "model"_a, "components"_a = Components());
    m.def("list_weights", &list_weights, "model"_a, py::kw_only(), "components"_a = Components(), "data_dir"_a);

    m.def("probe_run", &probe_run, "context"_a, "network"_a);
    m.def("probe_latent", &probe_latent, "context"_a);
    m.def("probe_weights", &probe_weights, "context"_a);
    m.def("probe_clip_tokens", &probe_clip_tokens, "merges_path"_a, "text"_a);
    m.def("probe_noise", &probe_noise, "rng"_a, "seed"_a, "n"_a);
    m.def("probe_sigmas", &probe_sigmas, "scheduler"_a, "steps"_a);
    m.def("probe_sample", &probe_sample, "sampler"_a, "sigmas"_a, "denoise"_a, "x"_a, py::kw_only(),
          "rng"_a = "cpu", "seed"_a = 0, "skip"_a = 0, "eta"_a = -1.0f);
    m.def("probe_checkpoint", &probe_checkpoint, "path"_a, "data"_a = true);
}
