// The parts of a context alone, for tests and benchmarks: sdcpp_probe.h.
#include "c_api/handle.h"

#include "checkpoint/diffusers_folder.h"
#include "checkpoint/gguf.h"
#include "checkpoint/safetensors.h"
#include "families/t5_text.h"
#include "kernels/peak.h"
#include "sampling/rng.h"
#include "sampling/sampler.h"
#include "sampling/schedule.h"
#include "text/clip_bpe.h"

using sd::give;
using sd::guarded;
using sd::need;
using sd::or_empty;
using sd::to_tensor;

namespace {

const char * const t5_place = "text_encoders.t5xxl.transformer";

// Of a vocabulary, or of a file or folder with a T5.
sd::T5Unigram open_t5_tokenizer(const std::string & path, const std::string & data_dir) {
    const bool is_model = sd::is_folder(path) || [&] {
        const sd::MappedFile file(path);
        return sd::is_gguf(file) || sd::is_safetensors(file);
    }();
    if (!is_model) {
        return sd::T5Unigram(sd::read_unigram_vocabulary(path));
    }
    sd::WeightStore weights(sd::Checkpoint::open("", {{"t5xxl", path}}));
    return sd::open_t5_tokenizer(weights.checkpoint(), weights.root(t5_place, ""), data_dir);
}

} // namespace

sd_status sd_probe_run(sd_ctx * ctx, const char * network, const sd_tensor * inputs, int n_inputs, sd_receive receive,
                       void * user) {
    return guarded([&] {
        need(ctx, "ctx");
        need(network, "network");
        std::map<std::string, sd::Tensor> tensors;
        for (int i = 0; i < n_inputs; ++i) {
            need(inputs, "inputs");
            tensors[or_empty(inputs[i].name)] = to_tensor(inputs[i]);
        }
        give(ctx->context.probe(network, tensors), receive, user);
    });
}

sd_status sd_probe_latent(sd_ctx * ctx, sd_receive receive, void * user) {
    return guarded([&] {
        need(ctx, "ctx");
        give(ctx->context.last_latent(), receive, user);
    });
}

sd_status sd_probe_profile(sd_ctx * ctx, bool on) {
    return guarded([&] {
        need(ctx, "ctx");
        ctx->context.set_profiling(on);
    });
}

bool sd_probe_operation(const sd_ctx * ctx, int index, sd_operation_cost * cost) {
    if (!ctx || !cost || !sd::is_index(ctx->context.profile(), index)) {
        return false;
    }
    const auto & [what, of] = *std::next(ctx->context.profile().begin(), index);
    *cost = {what.first.c_str(), what.second.c_str(), of.count, of.seconds, of.flops};
    return true;
}

sd_status sd_probe_peak(sd_ctx * ctx, double * flops) {
    return guarded([&] {
        need(ctx, "ctx");
        need(flops, "flops");
        const sd::Device & device = ctx->context.device();
        *flops = device.kernels() ? sd::peak_rate(*device.kernels(), device.pool()) : 0;
    });
}

sd_status sd_probe_text(sd_ctx * ctx, const char * text, sd_receive receive, void * user) {
    return guarded([&] {
        need(ctx, "ctx");
        need(text, "text");
        give(ctx->context.encode_text(text), receive, user);
    });
}

bool sd_probe_weight(const sd_ctx * ctx, int index, sd_weight_info * info) {
    if (!ctx) {
        return false;
    }
    const auto & weights = ctx->context.weights().weights();
    if (!info || !sd::is_index(weights, index)) {
        return false;
    }
    const sd::Weight & weight = weights[index];
    *info = {weight.name.c_str(), weight.diffusers.c_str(), sd::resident_type_name(weight),
             sd::dtype_name(weight.stored->type), {weight.ne[0], weight.ne[1], weight.ne[2], weight.ne[3]}};
    return true;
}

sd_status sd_probe_clip_tokens(const char * merges_path, const char * text, sd_receive receive, void * user) {
    return guarded([&] {
        need(merges_path, "merges_path");
        need(text, "text");
        const std::vector<int32_t> ids = sd::ClipBpe(merges_path).encode(text);
        give(std::vector<float>(ids.begin(), ids.end()), receive, user);
    });
}

sd_status sd_probe_t5_tokens(const char * path, const char * data_dir, const char * text, sd_receive receive, void * user) {
    return guarded([&] {
        need(path, "path");
        need(text, "text");
        const auto ids = open_t5_tokenizer(path, or_empty(data_dir)).encode(text);
        give(std::vector<float>(ids.begin(), ids.end()), receive, user);
    });
}

sd_status sd_probe_t5(const char * path, const sd_tensor * ids, const sd_tensor * mask, sd_receive receive, void * user) {
    return guarded([&] {
        need(path, "path");
        need(ids, "ids");
        sd::Inputs       inputs;
        const sd::Tensor given = to_tensor(*ids), seen = mask ? to_tensor(*mask) : sd::Tensor();
        inputs["ids"] = &given;
        if (mask) {
            inputs["mask"] = &seen;
        }
        sd::WeightStore weights(sd::Checkpoint::open("", {{"t5xxl", path}}));
        const sd::Scope scope = weights.root(t5_place, "");
        const sd::T5Encoder encoder(scope, sd::T5Config::read(scope));
        weights.check();
        sd::Device device("CPU", 1, "f32");
        weights.load(device);
        sd::Runner runner(device, weights);
        give(std::move(runner.run("t5", inputs, [&](sd::Graph & g) {
                 g.output("out", encoder(g, g.input_ids("ids"), mask ? g.input("mask") : nullptr));
             }).at("out")), receive, user);
    });
}

sd_status sd_probe_noise(const char * rng, uint64_t seed, int64_t n, sd_receive receive, void * user) {
    return guarded([&] {
        if (n < 1 || n > int64_t(1) << 30) {
            sd::fail(sd::Status::bad_argument, "%lld numbers of noise", static_cast<long long>(n));
        }
        std::vector<float> values(static_cast<size_t>(n));
        sd::make_rng(or_empty(rng), seed)->normal(values.data(), values.size());
        give(std::move(values), receive, user);
    });
}

sd_status sd_probe_sigmas(const char * scheduler, int steps, bool zero_snr, sd_receive receive, void * user) {
    return guarded([&] {
        const auto trained = sd::NoiseSchedule::scaled_linear(sd::align_your_steps_sd1(), zero_snr);
        give(sd::make_sigmas(or_empty(scheduler), trained, steps), receive, user);
    });
}

sd_status sd_probe_sample(const char * sampler, const float * sigmas, int n_sigmas, const char * rng, uint64_t seed,
                          int64_t skip, float eta, bool flow, float * x, int64_t n, int images, sd_probe_denoiser denoise,
                          void * user) {
    return guarded([&] {
        need(sigmas, "sigmas");
        need(x, "x");
        need(reinterpret_cast<const void *>(denoise), "denoise");
        if (n_sigmas < 1 || n < 1 || images < 1 || n % images != 0 || skip < 0) {
            sd::fail(sd::Status::bad_argument, "%lld numbers are not %d images", static_cast<long long>(n), images);
        }
        std::vector<std::unique_ptr<sd::Rng>> rngs;
        std::vector<float>                    skipped(static_cast<size_t>(skip));
        for (int image = 0; image < images; ++image) {
            rngs.push_back(sd::make_rng(or_empty(rng), seed + image));
            rngs.back()->normal(skipped.data(), skipped.size());
        }
        std::vector<float> state(x, x + n);
        sd::SamplerRun     run;
        run.sigmas.assign(sigmas, sigmas + n_sigmas);
        run.rngs = &rngs;
        run.eta = eta;
        static const sd::NoiseSchedule trained = sd::NoiseSchedule::scaled_linear();
        run.trained = &trained;
        run.flow = flow;
        run.denoise = [&](const std::vector<float> & at, float sigma, std::vector<float> & denoised) {
            denoised.resize(at.size());
            if (!denoise(at.data(), sigma, denoised.data(), n, user)) {
                sd::fail(sd::Status::cancelled, "the denoiser stopped the run");
            }
        };
        sd::sample(or_empty(sampler), run, state);
        std::copy(state.begin(), state.end(), x);
    });
}

sd_status sd_probe_checkpoint(const char * path, sd_probe_stored each, void * user) {
    return guarded([&] {
        need(path, "path");
        need(reinterpret_cast<const void *>(each), "each");
        const sd::Checkpoint checkpoint = sd::Checkpoint::open(path);
        for (const sd::StoredTensor & tensor : checkpoint.tensors()) {
            const int64_t ne[4] = {tensor.ne[0], tensor.ne[1], tensor.ne[2], tensor.ne[3]};
            each(tensor.name.c_str(), sd::dtype_name(tensor.type), ne, tensor.dims, tensor.data(), tensor.bytes, user);
        }
    });
}
