#include "context.h"
#include "sdcpp_probe.h"

#include <algorithm>

namespace binding {

namespace {

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

sd_tensor tensor_of(const char * name, const Floats & array) {
    if (array.ndim() > 4) {
        raise(SD_BAD_ARGUMENT, py::str("{}: has {} dimensions; the most is 4").format(name, array.ndim()));
    }
    sd_tensor tensor{name, {1, 1, 1, 1}, const_cast<float *>(array.data())};
    std::reverse_copy(array.shape(), array.shape() + array.ndim(), tensor.ne);
    return tensor;
}

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
        inputs.push_back(tensor_of(keys[i].c_str(), values[i]));
    }
    const char * name = c_text(network, "network");
    Result result;
    const sd_status status = released([&] {
        return sd_probe_run(ctx.get(), name, inputs.data(), static_cast<int>(inputs.size()), Result::receive,
                            &result);
    });
    check(status);
    return result.array();
}

Floats probe_latent(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    Result result;
    check(sd_probe_latent(ctx.get(), Result::receive, &result));
    return result.array();
}

Floats probe_text(const Context & context, const std::string & words) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    const char * utf8 = c_text(words, "text");
    Result result;
    check(sd_probe_text(ctx.get(), utf8, Result::receive, &result));
    return result.array();
}

// numpy's order, without the leading ones that C fills up with.
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

void probe_profile(const Context & context, bool on) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    check(sd_probe_profile(ctx.get(), on));
}

py::list probe_operations(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    py::list out;
    sd_operation_cost cost;
    for (int i = 0; sd_probe_operation(ctx.get(), i, &cost); i++) {
        out.append(py::make_tuple(text(cost.network), text(cost.operation), cost.count, cost.seconds, cost.flops));
    }
    return out;
}

double probe_peak(const Context & context) {
    const std::shared_ptr<sd_ctx> ctx = context.handle();
    double flops = 0;
    check(sd_probe_peak(ctx.get(), &flops));
    return flops;
}

// Runs a probe that gives one row of numbers.
template <class Probe>
Floats row(Probe && probe) {
    Result result;
    const sd_status status = released([&] { return probe(Result::receive, &result); });
    check(status);
    return result.flat();
}

py::array_t<int32_t> whole(const Floats & ids) {
    py::array_t<int32_t> out(ids.size());
    std::transform(ids.data(), ids.data() + ids.size(), out.mutable_data(),
                   [](float id) { return static_cast<int32_t>(id); });
    return out;
}

py::array_t<int32_t> probe_clip_tokens(const std::string & merges_path, const std::string & words) {
    const char * path = c_text(merges_path, "merges_path");
    const char * utf8 = c_text(words, "text");
    return whole(
        row([&](sd_receive receive, void * user) { return sd_probe_clip_tokens(path, utf8, receive, user); }));
}

py::array_t<int32_t> probe_t5_tokens(const std::string & path, const std::string & words, const std::string & data_dir) {
    const char * file = c_text(path, "path");
    const char * utf8 = c_text(words, "text");
    const char * data = c_text(data_dir, "data_dir");
    return whole(
        row([&](sd_receive receive, void * user) { return sd_probe_t5_tokens(file, data, utf8, receive, user); }));
}

Floats probe_t5(const std::string & path, const Floats & ids, const std::optional<Floats> & mask) {
    const char * file = c_text(path, "path");
    const sd_tensor given = tensor_of("ids", ids);
    const sd_tensor seen = mask ? tensor_of("mask", *mask) : sd_tensor();
    Result result;
    check(released([&] { return sd_probe_t5(file, &given, mask ? &seen : nullptr, Result::receive, &result); }));
    return result.array();
}

Floats probe_noise(const std::string & rng, uint64_t seed, int64_t n) {
    const char * name = c_text(rng, "rng");
    return row([&](sd_receive receive, void * user) { return sd_probe_noise(name, seed, n, receive, user); });
}

Floats probe_sigmas(const std::string & scheduler, int steps, bool zero_snr) {
    const char * name = c_text(scheduler, "scheduler");
    return row([&](sd_receive receive, void * user) { return sd_probe_sigmas(name, steps, zero_snr, receive, user); });
}

// `x` holds one image per row of its first dimension; `denoise` gets an array of that shape.
Floats probe_sample(const std::string & sampler, const Floats & sigmas, const py::function & denoise,
                    const Floats & x, const std::string & rng, uint64_t seed, int64_t skip, float eta, bool flow) {
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
    const sd_status status = released([&] {
        return sd_probe_sample(sampler_text, sigmas.data(), static_cast<int>(sigmas.size()), rng_text, seed,
                               skip, eta, flow, data, out.size(), images, denoiser, &call);
    });
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
    const sd_status status = released([&] { return sd_probe_checkpoint(file, each, &call); });
    call.raised.rethrow();
    check(status);
    return call.out;
}

} // namespace

void bind_probe(py::module_ & m) {
    m.def("probe_run", probe_run, "context"_a, "network"_a);
    m.def("probe_latent", probe_latent, "context"_a);
    m.def("probe_text", probe_text, "context"_a, "text"_a);
    m.def("probe_weights", probe_weights, "context"_a);
    m.def("probe_profile", probe_profile, "context"_a, "on"_a);
    m.def("probe_operations", probe_operations, "context"_a);
    m.def("probe_peak", probe_peak, "context"_a, py::call_guard<py::gil_scoped_release>());
    m.def("probe_clip_tokens", probe_clip_tokens, "merges_path"_a, "text"_a);
    m.def("probe_t5_tokens", probe_t5_tokens, "path"_a, "text"_a, "data_dir"_a = "");
    m.def("probe_t5", probe_t5, "path"_a, "ids"_a, "mask"_a = py::none());
    m.def("probe_noise", probe_noise, "rng"_a, "seed"_a, "n"_a);
    m.def("probe_sigmas", probe_sigmas, "scheduler"_a, "steps"_a, "zero_snr"_a = false);
    m.def("probe_sample", probe_sample, "sampler"_a, "sigmas"_a, "denoise"_a, "x"_a, py::kw_only(),
          "rng"_a = "cpu", "seed"_a = 0, "skip"_a = 0, "eta"_a = -1.0f, "flow"_a = false);
    m.def("probe_checkpoint", probe_checkpoint, "path"_a, "data"_a = true);
}

} // namespace binding
