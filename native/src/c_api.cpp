// The C surface over Context. Every entry goes through guarded(): the only place where exceptions end.
#include "sdcpp.h"
#include "sdcpp_probe.h"

#include "checkpoint/diffusers_folder.h"
#include "checkpoint/gguf.h"
#include "checkpoint/safetensors.h"
#include "context.h"
#include "core/error.h"
#include "families/t5_text.h"
#include "lora/lora_outline.h"
#include "nn/convert.h"
#include "sampling/rng.h"
#include "sampling/sampler.h"
#include "sampling/schedule.h"
#include "text/clip_bpe.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <new>

struct sd_ctx {
    sd::Context              context;
    std::vector<std::string> reports; // of the LoRAs that acted when they were asked for
    std::string              inspected;
    explicit sd_ctx(const sd::OpenParams & params) : context(params) {}
};

namespace {

static_assert(static_cast<int>(sd::Status::internal) == SD_INTERNAL && static_cast<int>(sd::Status::io) == SD_IO &&
                  static_cast<int>(sd::Status::cancelled) == SD_CANCELLED,
              "sd::Status carries sd_status's numbers");

thread_local std::string last_error;

sd_status failed(sd_status status, const std::string & message) {
    last_error = message;
    return status;
}

template <typename Function> sd_status guarded(Function && function) {
    last_error.clear();
    try {
        function();
        return SD_OK;
    } catch (const sd::Error & error) {
        return failed(static_cast<sd_status>(error.status), error.what());
    } catch (const std::bad_alloc &) {
        return failed(SD_OUT_OF_MEMORY, "memory could not be had; try a smaller picture or batch");
    } catch (const std::exception & error) {
        return failed(SD_INTERNAL, std::string("this should not happen, please report it: ") + error.what());
    } catch (...) {
        return failed(SD_INTERNAL, "this should not happen, please report it: an exception of an unknown kind");
    }
}

std::string or_empty(const char * text) { return text ? text : ""; }

void need(const void * pointer, const char * what) {
    if (!pointer) {
        sd::fail(sd::Status::bad_argument, "%s is NULL", what);
    }
}

const char * name_at(const std::vector<std::string> & names, int index) {
    return index >= 0 && static_cast<size_t>(index) < names.size() ? names[index].c_str() : nullptr;
}

sd::Prompt to_prompt(const sd_prompt & from) {
    sd::Prompt prompt;
    for (int i = 0; i < from.n_spans; ++i) {
        need(from.spans, "the spans of a prompt");
        prompt.push_back({or_empty(from.spans[i].text), from.spans[i].weight, from.spans[i].text == nullptr});
    }
    return prompt;
}

std::vector<sd::LoraUse> to_loras(const sd_lora * from, int n) {
    std::vector<sd::LoraUse> uses;
    for (int i = 0; i < n; ++i) {
        need(from, "the list of LoRAs");
        need(from[i].path, "the path of a LoRA");
        sd::LoraUse use{from[i].path, from[i].text, from[i].unet, from[i].start, from[i].stop, {}};
        for (int k = 0; k < from[i].n_blocks; ++k) {
            need(from[i].blocks, "the block weights of a LoRA");
            use.blocks.push_back({or_empty(from[i].blocks[k].prefix), from[i].blocks[k].factor});
        }
        uses.push_back(std::move(use));
    }
    return uses;
}

std::vector<sd::Prompt> to_prompts(const sd_prompt * from, int n) {
    std::vector<sd::Prompt> prompts;
    for (int i = 0; i < n; ++i) {
        need(from, "the list of prompts");
        prompts.push_back(to_prompt(from[i]));
    }
    return prompts;
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
    request.cfg_scale = from.cfg_scale;
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

bool is_in_ram(const std::string & base_copy) {
    if (!base_copy.empty() && base_copy != "file" && base_copy != "ram") {
        sd::fail(sd::Status::bad_argument, "base_copy '%s' is not known; there are: file, ram", base_copy.c_str());
    }
    return base_copy == "ram";
}

sd::LoraOptions to_lora_options(const sd_open_params & from) {
    const std::string mode = from.lora_mode ? from.lora_mode : "runtime";
    if (mode != "runtime" && mode != "restore" && mode != "diff") {
        sd::fail(sd::Status::bad_argument, "lora_mode '%s' is not known; there are: runtime, restore, diff", mode.c_str());
    }
    sd::LoraOptions options;
    options.mode = mode == "restore" ? sd::LoraMode::restore : mode == "diff" ? sd::LoraMode::diff : sd::LoraMode::runtime;
    options.merge.requantise = from.requantise;
    options.strict = from.strict_loras;
    if (from.lora_cache > 0) {
        options.cache_bytes = from.lora_cache;
    }
    return options;
}

std::vector<sd::ComponentFile> to_components(const sd_component * from, int n) {
    std::vector<sd::ComponentFile> components;
    for (int i = 0; i < n; ++i) {
        need(from, "components");
        components.push_back({or_empty(from[i].role), or_empty(from[i].path)});
    }
    return components;
}

sd::DType type_named(const char * name) {
    need(name, "the name of a type");
    const sd::DTypeInfo * info = sd::dtype_by_name(name);
    if (!info) {
        sd::fail(sd::Status::bad_argument, "type '%s' is not known; q8_0, q4_K and f16 are", name);
    }
    return info->type;
}

sd::Tensor to_tensor(const sd_tensor & from) {
    constexpr int64_t limit = int64_t(1) << 32; // numbers; a test's tensor is far below
    int64_t           n = 1;
    for (const int64_t length : from.ne) {
        if (length < 1 || length > limit || (n *= length) > limit) {
            sd::fail(sd::Status::bad_argument, "input '%s': a dimension of %lld", or_empty(from.name).c_str(),
                     static_cast<long long>(length));
        }
    }
    need(from.data, "an input's data");
    sd::Tensor tensor({from.ne[0], from.ne[1], from.ne[2], from.ne[3]});
    std::copy(from.data, from.data + n, tensor.data.begin());
    return tensor;
}

void give(sd::Tensor tensor, sd_receive receive, void * user) {
    need(reinterpret_cast<const void *>(receive), "the receiver");
    const sd_tensor out{"", {tensor.ne[0], tensor.ne[1], tensor.ne[2], tensor.ne[3]}, tensor.data.data()};
    receive(&out, user);
}

void give(std::vector<float> values, sd_receive receive, void * user) {
    sd::Tensor tensor;
    tensor.ne = {static_cast<int64_t>(values.size()), 1, 1, 1};
    tensor.data = std::move(values);
    give(std::move(tensor), receive, user);
}

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

// ---- sdcpp.h -------------------------------------------------------------------------------------------

const char * sd_last_error(void) { return last_error.c_str(); }

const char * sd_version(void) { return SDCPP_VERSION; }

const char * sd_sampler_name(int index) { return name_at(sd::sampler_names(), index); }
const char * sd_scheduler_name(int index) { return name_at(sd::scheduler_names(), index); }
const char * sd_rng_name(int index) { return name_at(sd::rng_names(), index); }

const char * sd_family_name(int index) {
    const auto & families = sd::families();
    return index >= 0 && static_cast<size_t>(index) < families.size() ? families[index]->name : nullptr;
}

bool sd_get_device(int index, sd_device * device) {
    static thread_local std::vector<sd::DeviceInfo> known; // keeps the strings alive until the thread asks again
    if (index <= 0 && guarded([] { known = sd::devices(); }) != SD_OK) {
        return false;
    }
    if (!device || index < 0 || static_cast<size_t>(index) >= known.size()) {
        return false;
    }
    const sd::DeviceInfo & info = known[index];
    *device = {info.name.c_str(), info.description.c_str(), info.memory_free, info.memory_total, info.is_cpu};
    return true;
}

sd_status sd_add_rpc_devices(const char * endpoint) {
    return guarded([&] {
        need(endpoint, "endpoint");
        sd::add_rpc_devices(endpoint);
    });
}

const char * sd_build_info(void) {
    static const std::string info = [] {
        std::string ggml;
        if (guarded([&] { ggml = sd::ggml_info(); }) != SD_OK) {
            ggml = "ggml: " + last_error + "\n";
        }
        std::string kernels;
        if (guarded([&] { kernels = sd::kernels_info(); }) != SD_OK) {
            kernels = "CPU kernels: " + last_error + "\n";
        }
        return sd::text("sdcpp: %s\ncompiler: %s\n", SDCPP_VERSION, __VERSION__) + kernels + ggml;
    }();
    return info.c_str();
}

sd_open_params sd_default_open_params(void) { return {}; }

sd_status sd_open(const sd_open_params * params, sd_ctx ** ctx) {
    if (ctx) {
        *ctx = nullptr;
    }
    return guarded([&] {
        need(ctx, "ctx");
        need(params, "params");
        need(params->model, "params.model");
        sd::OpenParams open;
        open.model = params->model;
        open.components = to_components(params->components, params->n_components);
        open.data_dir = or_empty(params->data_dir);
        open.backend = or_empty(params->backend);
        open.prediction = or_empty(params->prediction);
        open.threads = params->threads;
        open.precision = or_empty(params->precision);
        open.in_ram = is_in_ram(or_empty(params->base_copy));
        open.loras = to_lora_options(*params);
        if (params->log) {
            open.log = [call = params->log, user = params->log_user](sd::Level level, const std::string & message) {
                call(static_cast<sd_log_level>(level), message.c_str(), user);
            };
            open.loras.log = open.log;
        }
        *ctx = new sd_ctx(open);
    });
}

void sd_close(sd_ctx * ctx) { delete ctx; }

sd_model_info sd_get_model_info(const sd_ctx * ctx) {
    if (!ctx) {
        return {};
    }
    const sd::Context &  context = ctx->context;
    const sd::Pipeline & pipeline = context.pipeline();
    return {context.family().name,
            pipeline.prediction() == sd::Prediction::v      ? "v"
            : pipeline.prediction() == sd::Prediction::flow ? "flow"
                                                            : "eps",
            context.device().name().c_str(),
            context.device().threads(),
            context.device().kernels_name(),
            context.device().precision(),
            pipeline.size_multiple(),
            pipeline.native_size(),
            static_cast<int>(pipeline.latent_format().channels),
            pipeline.input_channels(),
            context.weights().resident_bytes(),
            static_cast<int>(context.weights().weights().size()),
            pipeline.latent_format().reduction};
}

sd_status sd_fingerprint(sd_ctx * ctx, char hex[65]) {
    return guarded([&] {
        need(ctx, "ctx");
        need(hex, "hex");
        std::memcpy(hex, ctx->context.fingerprint().c_str(), 65);
    });
}

bool sd_get_type(int index, sd_type * type) {
    const sd::DTypeInfo * info = sd::dtype_at(index);
    if (!type || !info) {
        return false;
    }
    *type = {info->name, static_cast<int>(info->type), info->block, info->block_bytes,
             sd::can_read(info->type), sd::can_write(info->type), sd::wants_importance(info->type)};
    return true;
}

sd_status sd_convert_rows(const char * from_type, const void * from, const char * to_type, void * to, int64_t rows,
                          int64_t row_length, const float * importance) {
    return guarded([&] {
        if (rows < 0 || row_length < 0) {
            sd::fail(sd::Status::bad_argument, "%lld rows of %lld: both must be from 0 up", static_cast<long long>(rows),
                     static_cast<long long>(row_length));
        }
        need(from, "from");
        need(to, "to");
        sd::convert_rows(type_named(from_type), from, type_named(to_type), to, rows, row_length, importance);
    });
}

sd_status sd_list_tensors(const char * model, const sd_component * components, int n_components,
                          sd_on_stored on_tensor, sd_on_metadata on_metadata, void * user) {
    return guarded([&] {
        need(model, "model");
        const sd::Checkpoint checkpoint = sd::Checkpoint::open(model, to_components(components, n_components));
        for (const sd::StoredTensor & tensor : checkpoint.tensors()) {
            const sd_stored stored{tensor.name.c_str(),
                                   sd::dtype_name(tensor.type),
                                   tensor.dims,
                                   {tensor.ne[0], tensor.ne[1], tensor.ne[2], tensor.ne[3]},
                                   tensor.file->path().c_str(),
                                   tensor.offset,
                                   tensor.bytes,
                                   tensor.scale};
            if (on_tensor && !on_tensor(&stored, user)) {
                sd::fail(sd::Status::cancelled, "the list was stopped");
            }
        }
        for (const auto & [key, value] : checkpoint.metadata()) {
            if (on_metadata && !on_metadata(key.c_str(), value.c_str(), user)) {
                sd::fail(sd::Status::cancelled, "the list was stopped");
            }
        }
    });
}

sd_status sd_list_weights(const sd_open_params * params, const char ** family, sd_on_declared on_weight, void * user) {
    return guarded([&] {
        need(params, "params");
        need(params->model, "params.model");
        sd::WeightStore weights(sd::Checkpoint::open(params->model, to_components(params->components, params->n_components)));
        const sd::Family & known = sd::recognise(weights.checkpoint());
        const auto         pipeline = known.open(weights, {or_empty(params->data_dir), or_empty(params->prediction)});
        if (family) {
            *family = known.name;
        }
        for (const sd::Weight & weight : weights.weights()) {
            sd_declared declared{weight.name.c_str(),
                                 weight.diffusers.c_str(),
                                 {weight.ne[0], weight.ne[1], weight.ne[2], weight.ne[3]},
                                 0,
                                 weight.ne[1] * weight.ne[2] * weight.ne[3],
                                 false,
                                 weight.table};
            bool go_on = !on_weight || !weight.parts.empty() || on_weight(&declared, user);
            for (const sd::WeightPart & part : weight.parts) {
                declared.diffusers_name = part.diffusers.c_str();
                declared.first_row = part.first_row;
                declared.rows = part.rows;
                declared.swap_halves = part.swap_halves;
                go_on = go_on && (!on_weight || on_weight(&declared, user));
            }
            if (!go_on) {
                sd::fail(sd::Status::cancelled, "the list was stopped");
            }
        }
    });
}

sd_request sd_default_request(const sd_ctx * ctx) {
    if (!ctx) {
        return {};
    }
    const sd::Pipeline & pipeline = ctx->context.pipeline();
    const sd::Defaults   defaults = pipeline.defaults();
    sd_request           request{};
    request.width = request.height = pipeline.native_size();
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

sd_status sd_apply_loras(sd_ctx * ctx, const sd_lora * loras, int n_loras) {
    return guarded([&] {
        need(ctx, "ctx");
        ctx->context.apply_loras({{to_loras(loras, n_loras)}});
    });
}

sd_status sd_reset_loras(sd_ctx * ctx) {
    return guarded([&] {
        need(ctx, "ctx");
        ctx->context.reset_loras();
    });
}

bool sd_get_lora(const sd_ctx * ctx, int image, int index, sd_lora * lora) {
    const auto & images = ctx->context.loras().state().images;
    if (!lora || image < 0 || index < 0 || images.empty()) {
        return false;
    }
    const auto & uses = images[images.size() == 1 ? 0 : std::min<size_t>(image, images.size() - 1)];
    if (static_cast<size_t>(index) >= uses.size()) {
        return false;
    }
    const sd::LoraUse & use = uses[index];
    *lora = {use.path.c_str(), use.text, use.unet, use.start, use.stop, nullptr, 0};
    return true;
}

const char * sd_lora_report(sd_ctx * ctx, int index) {
    if (index <= 0) {
        ctx->reports.clear();
        for (const sd::LoraReport & report : ctx->context.loras().reports()) {
            ctx->reports.push_back(sd::report_json(report));
        }
    }
    return name_at(ctx->reports, index);
}

sd_status sd_inspect_lora(sd_ctx * ctx, const char * path, const char ** json) {
    return guarded([&] {
        need(ctx, "ctx");
        need(path, "path");
        need(json, "json");
        ctx->inspected = sd::report_json(ctx->context.inspect_lora(path));
        *json = ctx->inspected.c_str();
    });
}

sd_status sd_lora_drift(sd_ctx * ctx, double * drift) {
    return guarded([&] {
        need(ctx, "ctx");
        need(drift, "drift");
        *drift = ctx->context.lora_drift();
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
    if (!ctx || !importance || index < 0 || static_cast<size_t>(index) >= ctx->context.importance().size()) {
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

// ---- sdcpp_probe.h -------------------------------------------------------------------------------------

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
    if (!ctx || !cost || index < 0 || index >= static_cast<int>(ctx->context.profile().size())) {
        return false;
    }
    const auto & [what, of] = *std::next(ctx->context.profile().begin(), index);
    *cost = {what.first.c_str(), what.second.c_str(), of.count, of.seconds, of.flops};
    return true;
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
    if (!info || index < 0 || static_cast<size_t>(index) >= weights.size()) {
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

sd_status sd_probe_sigmas(const char * scheduler, int steps, sd_receive receive, void * user) {
    return guarded([&] {
        give(sd::make_sigmas(or_empty(scheduler), sd::NoiseSchedule::scaled_linear(), steps), receive, user);
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

// ---- LoRA files without a model ---------------------------------------------------------

struct sd_lora_file {
    sd::LoraOutline reader;
    std::string    report;
    sd_lora_file(const char * path, std::deque<sd::Weight> outline)
        : reader(path, std::move(outline)), report(sd::report_json(reader.report())) {}

    // Of a weight of the outline.
    int index_of(const sd::Weight * weight) const {
        const auto & all = reader.weights();
        const auto at = std::find_if(all.begin(), all.end(), [&](const auto & one) { return &one == weight; });
        return static_cast<int>(at - all.begin());
    }
};

namespace {

constexpr int64_t LARGEST_SIDE = int64_t(1) << 31;

sd::Weight outlined(const sd_outline_weight & given) {
    need(given.name, "the name of a weight");
    sd::Weight out;
    out.name = given.name;
    out.diffusers = or_empty(given.diffusers_name);
    out.ne = {given.ne[0], given.ne[1], given.ne[2], given.ne[3]};
    out.table = given.table;
    for (const int64_t side : out.ne) {
        if (side < 1 || side > LARGEST_SIDE) {
            sd::fail(sd::Status::bad_argument, "%s: has a dimension of %lld", given.name, static_cast<long long>(side));
        }
    }
    for (int i = 0; i < given.n_parts; ++i) {
        const sd_outline_part & part = given.parts[i];
        out.parts.push_back({or_empty(part.diffusers_name), part.first_row, part.rows, part.swap_halves});
    }
    return out;
}

template <typename Entries> bool is_index(const Entries & entries, int index) {
    return index >= 0 && static_cast<size_t>(index) < entries.size();
}

void give(const sd_lora_file & file, const sd::LoraModule & module, sd_receive_module receive, void * user) {
    std::vector<sd_lora_factor> factors;
    const auto add = [&](const char * role, const sd::Factor & factor) {
        sd_lora_factor out{role, static_cast<int>(factor.shape.size()), {1, 1, 1, 1}, factor.data.data()};
        std::copy(factor.shape.begin(), factor.shape.end(), out.shape);
        factors.push_back(out);
    };
    for (const auto & [role, factor] : module.factors) {
        add(role.c_str(), factor);
    }
    if (module.magnitude) {
        add("magnitude", *module.magnitude);
    }
    const sd::LoraTarget & target = module.target;
    const sd_lora_module   out{sd::lora_kind_name(module.kind),
                             file.index_of(target.weight),
                             target.first_row,
                             target.rows,
                             target.swap_halves,
                             module.scale,
                             module.on_input,
                             module.magnitude_of_columns,
                             module.constraint.value_or(-1),
                             factors.data(),
                             static_cast<int>(factors.size())};
    receive(&out, user);
}

} // namespace

sd_status sd_probe_lora_file_open(const char * path, const sd_outline_weight * weights, int n_weights, sd_lora_file ** file,
                            const char ** json) {
    return guarded([&] {
        need(path, "path");
        need(file, "file");
        *file = nullptr;
        std::deque<sd::Weight> outline;
        for (int i = 0; i < n_weights; ++i) {
            need(weights, "weights");
            outline.push_back(outlined(weights[i]));
        }
        *file = new sd_lora_file(path, std::move(outline));
        if (json) {
            *json = (*file)->report.c_str();
        }
    });
}

void sd_probe_lora_file_close(sd_lora_file * file) { delete file; }

bool sd_probe_lora_file_stem(const sd_lora_file * file, int index, sd_lora_stem * stem) {
    if (!file || !stem || !is_index(file->reader.entries(), index)) {
        return false;
    }
    const sd::LoraOutline::Entry & entry = file->reader.entries()[index];
    const sd::LoraTarget *        target = entry.weight ? &*entry.weight : entry.bias ? &*entry.bias : nullptr;
    const sd::StoredTensor *      largest = nullptr;
    int64_t                       elements = 0, bytes = 0;
    for (const auto & member : entry.group->members) {
        elements += sd::count(member.tensor->ne);
        bytes += static_cast<int64_t>(member.tensor->bytes);
        if (!largest || member.tensor->bytes > largest->bytes) {
            largest = member.tensor;
        }
    }
    *stem = {entry.group->stem.c_str(),
             entry.format.c_str(),
             entry.weight ? file->index_of(entry.weight->weight) : -1,
             entry.bias ? file->index_of(entry.bias->weight) : -1,
             target ? target->first_row : 0,
             target ? target->rows : 0,
             entry.stated.out,
             entry.stated.columns,
             static_cast<int>(entry.stated.kh),
             static_cast<int>(entry.stated.kw),
             entry.absent,
             largest ? sd::dtype_name(largest->type) : "",
             elements,
             bytes};
    return true;
}

sd_status sd_probe_lora_file_read(const sd_lora_file * file, int stem, sd_receive_module receive, void * user) {
    return guarded([&] {
        need(file, "file");
        need(reinterpret_cast<const void *>(receive), "receive");
        if (!is_index(file->reader.entries(), stem)) {
            sd::fail(sd::Status::bad_argument, "the file has no stem %d", stem);
        }
        for (const sd::LoraModule & module : file->reader.read(static_cast<size_t>(stem))) {
            give(*file, module, receive, user);
        }
    });
}

sd_status sd_probe_lora_file_delta(const sd_lora_file * file, int stem, int module, const float * base, float multiplier,
                             sd_receive receive, void * user) {
    return guarded([&] {
        need(file, "file");
        if (!is_index(file->reader.entries(), stem) || module < 0) {
            sd::fail(sd::Status::bad_argument, "the file has no stem %d", stem);
        }
        give(file->reader.delta(static_cast<size_t>(stem), static_cast<size_t>(module), base, multiplier), receive,
             user);
    });
}
