#include "context.h"

#include <algorithm>

namespace binding {

namespace {

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

py::dict info(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    const sd_model_info info = sd_get_model_info(ctx.get());
    return py::dict("family"_a = text(info.family), "prediction"_a = text(info.prediction),
                    "backend"_a = text(info.backend), "threads"_a = info.threads, "kernels"_a = text(info.kernels),
                    "precision"_a = text(info.precision),
                    "size_multiple"_a = info.size_multiple, "native_size"_a = info.native_size,
                    "latent_channels"_a = info.latent_channels, "latent_cell"_a = info.latent_cell,
                    "input_channels"_a = info.input_channels, "weight_bytes"_a = info.weight_bytes,
                    "n_weights"_a = info.n_weights, "zero_snr"_a = info.zero_snr,
                    "redux_size"_a = info.redux_size);
}

py::dict defaults(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    const sd_request request = sd_default_request(ctx.get());
    return py::dict("width"_a = request.width, "height"_a = request.height, "steps"_a = request.steps,
                    "cfg_scale"_a = request.cfg_scale, "guidance"_a = request.guidance,
                    "shift"_a = request.shift, "sampler"_a = text_or_none(request.sampler),
                    "scheduler"_a = text_or_none(request.scheduler), "rng"_a = text_or_none(request.rng),
                    "eta"_a = request.eta, "clip_skip"_a = request.clip_skip, "strength"_a = request.strength,
                    "vae_tile"_a = request.vae_tile);
}

std::string fingerprint(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    char hex[65];
    const sd_status status = released([&] { return sd_fingerprint(ctx.get(), hex); });
    check(status);
    return hex;
}

void collect_importance(const Context & context, bool on) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    check(released([&] { return sd_collect_importance(ctx.get(), on); }));
}

// By the name of a matrix: the sums of squares of its columns, and over how many rows.
py::dict importance(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    py::dict out;
    sd_importance of;
    for (int i = 0; sd_get_importance(ctx.get(), i, &of); i++) {
        out[text(of.name)] =
            py::make_tuple(py::array_t<double>(static_cast<py::ssize_t>(of.columns), of.sums), of.rows);
    }
    return out;
}

// Each word comes as its name and an array (vectors, width) for each text encoder.
void learn_words(const Context & context, const std::vector<std::pair<std::string, std::vector<Floats>>> & words) {
    std::vector<sd_learned_word> wanted;
    for (const auto & [name, tables] : words) {
        sd_learned_word word{c_text(name, "name"), 0, {nullptr, nullptr}, {0, 0}};
        if (tables.empty() || tables.size() > 2) {
            raise(SD_BAD_ARGUMENT, py::str("embedding {!r}: is for {} text encoders").format(name, tables.size()));
        }
        for (size_t i = 0; i < tables.size(); i++) {
            if (tables[i].ndim() != 2 || tables[i].shape(0) != tables[0].shape(0)) {
                raise(SD_BAD_ARGUMENT, py::str("embedding {!r}: expected arrays (vectors, width)").format(name));
            }
            word.vectors = static_cast<int>(tables[i].shape(0));
            word.width[i] = static_cast<int>(tables[i].shape(1));
            word.data[i] = tables[i].data();
        }
        wanted.push_back(word);
    }
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    check(released([&] { return sd_learn_words(ctx.get(), wanted.data(), static_cast<int>(wanted.size())); }));
}

int count_tokens(const Context & context, const std::string & words) {
    int count = 0;
    check(sd_count_tokens(context.handle().get(), c_text(words, "text"), &count));
    return count;
}

} // namespace

Context::Context(const std::string & model, const std::map<std::string, std::string> & components,
                 const std::string & data_dir, const Name & backend, int threads, const Name & precision, const Name & prediction,
                 const Name & lora_mode, const Name & base_copy, bool requantise, bool strict_loras,
                 size_t lora_cache, std::optional<bool> zero_snr, size_t memory_limit) {
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
    params.precision = c_text(precision, "precision");
    params.prediction = c_text(prediction, "prediction");
    params.zero_snr = zero_snr ? (*zero_snr ? 1 : -1) : 0;
    params.lora_mode = c_text(lora_mode, "lora_mode");
    params.base_copy = c_text(base_copy, "base_copy");
    params.requantise = requantise;
    params.strict_loras = strict_loras;
    params.lora_cache = lora_cache;
    params.memory_limit = memory_limit;
    params.log = log_to_python;
    params.log_user = while_logging_.get();

    sd_ctx * ctx = nullptr;
    const sd_status status = released([&] { return sd_open(&params, &ctx); });
    if (ctx) {
        handle_ = std::shared_ptr<sd_ctx>(ctx, [log_user = while_logging_](sd_ctx * last) {
            const py::gil_scoped_release release; // closing may log
            sd_close(last);
        });
    }
    while_logging_->rethrow();
    check(status);
}

std::shared_ptr<sd_ctx> Context::handle() const {
    if (!handle_) {
        raise(SD_BAD_ARGUMENT, py::str("this context is closed; open another"));
    }
    return handle_;
}

ContextClass bind_context(py::module_ & m) {
    return ContextClass(m, "Context")
        .def(py::init<const std::string &, const std::map<std::string, std::string> &, const std::string &,
                      const Name &, int, const Name &, const Name &, const Name &, const Name &, bool, bool, size_t,
                      std::optional<bool>, size_t>(),
             "model"_a, py::kw_only(), "components"_a = py::dict(), "data_dir"_a, "backend"_a = py::none(),
             "threads"_a = 0, "precision"_a = py::none(), "prediction"_a = py::none(), "lora_mode"_a = py::none(),
             "base_copy"_a = py::none(), "requantise"_a = false, "strict_loras"_a = false, "lora_cache"_a = 0,
             "zero_snr"_a = py::none(), "memory_limit"_a = 0)
        .def("close", &Context::close)
        .def_property_readonly("closed", &Context::closed)
        .def("info", info)
        .def("defaults", defaults)
        .def("fingerprint", fingerprint)
        .def("count_tokens", count_tokens, "text"_a)
        .def("learn_words", learn_words, "words"_a)
        .def("collect_importance", collect_importance, "on"_a)
        .def("importance", importance);
}

} // namespace binding
