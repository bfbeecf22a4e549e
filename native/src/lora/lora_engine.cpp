#include "lora/lora_engine.h"

#include "core/error.h"
#include "lora/lora_names.h"
#include "nn/device.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <new>
#include <numeric>
#include <utility>

namespace sd {
namespace {

bool always(const LoraUse &) { return true; }

// What all uses of one LoRA in one image's list make of a weight. Text encoders run before the steps.
double multiplier_on(const Weight & weight, const std::string & path, const std::vector<LoraUse> & uses,
                     const std::function<bool(const LoraUse &)> & acts) {
    const bool text = is_text_weight(weight);
    double sum = 0;
    for (const LoraUse & use : uses) {
        if (use.path == path && (text || acts(use))) {
            sum += multiplier_of(use, weight);
        }
    }
    return sum;
}

bool takes_part(const Weight & weight, const std::string & path, const LoraState & state) {
    for (const std::vector<LoraUse> & uses : state.images) {
        for (const LoraUse & use : uses) {
            if (use.path == path && multiplier_of(use, weight) != 0) {
                return true;
            }
        }
    }
    return false;
}

// The different multipliers that the steps of all images bring; between two bounds of ranges nothing changes.
std::vector<float> multipliers_over_time(const Weight & weight, const std::string & path,
                                         const LoraState & state) {
    std::set<float> out;
    for (const std::vector<LoraUse> & uses : state.images) {
        std::set<double> bounds{0};
        for (const LoraUse & use : uses) {
            bounds.insert(use.start);
        }
        for (const LoraUse & use : uses) {
            bounds.insert(use.stop);
        }
        for (const double at : bounds) {
            out.insert(static_cast<float>(multiplier_on(weight, path, uses, [at](const LoraUse & use) {
                return use.start <= at && (at < use.stop || use.stop >= 1);
            })));
        }
    }
    out.erase(0.0f);
    return {out.begin(), out.end()};
}

} // namespace

LoraEngine::LoraEngine(WeightStore & weights, const Device & device, LoraReader read, LoraOptions options)
    : weights_(weights), device_(device), options_(std::move(options)),
      cache_(std::move(read), weights, options_.cache_bytes), merge_(weights, device, options_.merge) {}

// ---- asking for another state --------------------------------------------------------------------------

bool LoraEngine::apply(const LoraState & wanted) {
    LoraState state = resolved(wanted);
    check(state);
    try {
        return change(state);
    } catch (const std::bad_alloc &) {
        std::set<std::string> paths;
        for (const std::vector<LoraUse> & uses : state.images) {
            for (const LoraUse & use : uses) {
                paths.insert(use.path);
            }
        }
        fail(Status::out_of_memory,
             "memory for %zu LoRAs (%s) could not be had on %s; name fewer or smaller ones, or lower lora_cache",
             paths.size(), paths.empty() ? "none" : paths.begin()->c_str(), device_.name().c_str());
    }
}

bool LoraEngine::change(LoraState state) {
    Loras loras = load(state);
    if (state == state_ && loras == loras_) {
        return false;
    }
    if (options_.mode == LoraMode::runtime) {
        std::vector<ActiveUpdate> now = active(state, loras);
        const bool acts = !now.empty();
        if (acts && (!pack_ || pack_->active() != now)) {
            Loras of = loras;
            pack_ = std::make_unique<LoraPack>(std::move(now), weights_, device_, pack_.get());
            packed_ = std::move(of);
        }
        acts_ = acts;
    } else {
        std::vector<WeightSum> now = sums(state, loras);
        if (options_.mode == LoraMode::restore) {
            rebuild(now);
        } else {
            add_differences(now);
        }
        sums_ = std::move(now);
    }
    if (options_.log) {
        for (const LoraChange & change : lora_state_diff(state_, state)) {
            const auto & of_text = change.use.text;
            options_.log(Level::debug, text("%s: %+g for the denoiser, %+g, %+g, %+g for the text encoders",
                                            change.use.path.c_str(), change.use.unet, of_text[first_encoder],
                                            of_text[clip_g_encoder], of_text[t5_encoder]));
        }
    }
    state_ = std::move(state);
    loras_ = std::move(loras);
    tell(loras_);
    return true;
}

// What of a file does not act, once per file.
void LoraEngine::tell(const Loras & loras) {
    for (const auto & lora : loras) {
        const LoraReport & report = lora->report;
        if (!options_.log || !told_.insert(lora->stamp).second) {
            continue;
        }
        const size_t left = report.skipped.size() + report.unmatched.size();
        if (left > 0) {
            options_.log(
                Level::warning,
                text("%s: %zu modules act, %zu modules or keys fit nothing in this model, first %s; see "
                     "its report, or sdcpp lora inspect",
                     lora->path.c_str(), report.applied.size(), left,
                     (report.skipped.empty() ? report.unmatched : report.skipped).front().c_str()));
        }
        for (const std::string & warning : report.warnings) {
            options_.log(Level::warning, lora->path + ": " + warning);
        }
    }
}

// Canonical, with real paths: two names of one file are one LoRA.
LoraState LoraEngine::resolved(const LoraState & wanted) const {
    LoraState state = wanted;
    std::map<std::string, std::string> known;
    for (std::vector<LoraUse> & uses : state.images) {
        for (LoraUse & use : uses) {
            std::string & path = known[use.path];
            path = path.empty() ? real_path(use.path) : path;
            use.path = path;
        }
    }
    return canonical(state);
}

void LoraEngine::check(const LoraState & state) const {
    if (options_.mode == LoraMode::runtime) {
        return;
    }
    const char * mode = options_.mode == LoraMode::restore ? "restore" : "diff";
    if (state.images.size() > 1) {
        fail(Status::bad_argument,
             "other LoRAs for each of %zu images need lora_mode 'runtime'; with '%s' there is one "
             "set of weights for all",
             state.images.size(), mode);
    }
    for (const std::vector<LoraUse> & uses : state.images) {
        for (const LoraUse & use : uses) {
            if (use.start > 0 || use.stop < 1) {
                fail(Status::bad_argument,
                     "%s: a range of steps needs lora_mode 'runtime'; with '%s' weights stay the "
                     "same for all steps",
                     use.path.c_str(), mode);
            }
        }
    }
}

LoraEngine::Loras LoraEngine::load(const LoraState & state) {
    std::set<std::string> paths;
    for (const std::vector<LoraUse> & uses : state.images) {
        for (const LoraUse & use : uses) {
            paths.insert(use.path);
        }
    }
    Loras loras;
    size_t bytes = 0;
    for (const std::string & path : paths) {
        loras.push_back(cache_.get(path));
        const LoraReport & report = loras.back()->report;
        const size_t left = report.skipped.size() + report.unmatched.size();
        if (options_.strict && left > 0) {
            fail(Status::bad_file,
                 "%s: %zu keys or modules fit nothing in this model, first %s; load without strict_loras "
                 "to skip them",
                 path.c_str(), left,
                 (report.skipped.empty() ? report.unmatched : report.skipped).front().c_str());
        }
        bytes += loras.back()->bytes;
        weights_.make_room(bytes);
        const size_t free = device_.memory_free();
        if (free > 0 && bytes > free) {
            fail(Status::out_of_memory,
                 "the first %zu of %zu LoRAs need %zu MB already, but %s has %zu MB; name fewer of them",
                 loras.size(), paths.size(), bytes >> 20, device_.name().c_str(), free >> 20);
        }
    }
    return loras;
}

std::vector<ActiveUpdate> LoraEngine::active(const LoraState & state, const Loras & loras) const {
    std::vector<ActiveUpdate> out;
    for (const auto & lora : loras) {
        for (const Update & update : lora->updates) {
            const Weight & weight = *update.target.weight;
            if (!takes_part(weight, lora->path, state)) {
                continue;
            }
            if (update.is_linear()) {
                out.push_back({&update, lora.get(), 0});
                continue;
            }
            for (const float multiplier : multipliers_over_time(weight, lora->path, state)) {
                out.push_back({&update, lora.get(), multiplier});
            }
        }
    }
    return out;
}

std::vector<WeightSum> LoraEngine::sums(const LoraState & state, const Loras & loras) const {
    std::vector<WeightSum> out;
    std::map<const Weight *, size_t> at;
    for (const auto & lora : loras) {
        for (const Update & update : lora->updates) {
            const Weight * weight = update.target.weight;
            const double multiplier = multiplier_on(*weight, lora->path, state.images.front(), always);
            if (multiplier != 0 && update.shape.inputs > matrix_shape(*weight).inputs) {
                fail(Status::bad_argument,
                     "%s: is a control LoRA, which takes %lld input features of '%s' where the model has %lld; that needs "
                     "lora_mode 'runtime'",
                     lora->path.c_str(), static_cast<long long>(update.shape.inputs), weight->name.c_str(),
                     static_cast<long long>(matrix_shape(*weight).inputs));
            }
            if (multiplier != 0) {
                const auto [found, is_new] = at.try_emplace(weight, out.size());
                if (is_new) {
                    out.push_back({weight, {}});
                }
                out[found->second].terms.push_back({&update, multiplier});
            }
        }
    }
    return out;
}

// ---- weights that are written --------------------------------------------------------------------------

void LoraEngine::rebuild(const std::vector<WeightSum> & wanted) {
    std::map<const Weight *, WeightSum> before, after;
    for (const WeightSum & sum : sums_) {
        before[sum.weight] = sum;
    }
    for (const WeightSum & sum : wanted) {
        after[sum.weight] = sum;
        before.try_emplace(sum.weight, WeightSum{sum.weight, {}});
    }
    std::vector<WeightSum> changed, back;
    for (const auto & [weight, sum] : before) {
        const auto found = after.find(weight);
        const WeightSum now = found == after.end() ? WeightSum{weight, {}} : found->second;
        if (!(now.terms == sum.terms)) {
            changed.push_back(now);
            back.push_back(sum);
            touched_.insert(weight);
        }
    }
    try {
        merge_.rebuild(changed);
    } catch (...) {
        merge_.rebuild(back); // the same bits as before, since they depend on the state alone
        throw;
    }
}

void LoraEngine::add_differences(const std::vector<WeightSum> & wanted) {
    std::map<const Weight *, WeightSum> changes;
    for (const WeightSum & sum : wanted) {
        changes[sum.weight] = sum;
    }
    for (const WeightSum & sum : sums_) {
        WeightSum & change = changes.try_emplace(sum.weight, WeightSum{sum.weight, {}}).first->second;
        for (const WeightSum::Term & old : sum.terms) {
            const auto same =
                std::find_if(change.terms.begin(), change.terms.end(),
                             [&](const WeightSum::Term & term) { return term.update == old.update; });
            if (same == change.terms.end()) {
                change.terms.push_back({old.update, 0, old.multiplier});
            } else {
                same->former = old.multiplier;
            }
        }
    }
    std::vector<WeightSum> work;
    for (auto & [weight, sum] : changes) {
        sum.terms.erase(
            std::remove_if(sum.terms.begin(), sum.terms.end(),
                           [](const WeightSum::Term & term) { return term.multiplier == term.former; }),
            sum.terms.end());
        if (!sum.terms.empty()) {
            work.push_back(sum);
        }
    }
    merge_.add(work);
    bool of_text = false;
    for (const WeightSum & sum : work) {
        touched_.insert(sum.weight);
        of_text = of_text || is_text_weight(*sum.weight);
    }
    text_drift_ = of_text ? ++text_drifts_ : text_drift_;
}

void LoraEngine::reset() {
    std::vector<WeightSum> plain;
    for (const Weight * weight : touched_) {
        plain.push_back({weight, {}});
    }
    merge_.rebuild(plain);
    touched_.clear();
    text_drift_ = 0;
    sums_.clear();
    pack_.reset();
    packed_.clear();
    acts_ = false;
    loras_.clear();
    state_ = {};
}

double LoraEngine::drift() const {
    std::vector<WeightSum> now;
    for (const Weight * weight : touched_) {
        const auto found = std::find_if(sums_.begin(), sums_.end(),
                                        [&](const WeightSum & sum) { return sum.weight == weight; });
        now.push_back(found == sums_.end() ? WeightSum{weight, {}} : *found);
    }
    return merge_.drift(now);
}

// ---- what acts in graphs -------------------------------------------------------------------------------

const Adapters * LoraEngine::adapters() const { return acts_ ? &pack_->adapters() : nullptr; }

const std::vector<LoraUse> & LoraEngine::uses(size_t image) const {
    return state_.images[state_.images.size() == 1 ? 0 : image % state_.images.size()];
}

void LoraEngine::strengths_of(size_t image, const std::function<bool(const LoraUse &)> & acts,
                              float * to) const {
    pack_->strengths(
        [&](const ActiveUpdate & active) {
            const auto multiplier = static_cast<float>(
                multiplier_on(*active.update->target.weight, active.lora->path, uses(image), acts));
            return active.update->is_linear() ? multiplier : multiplier == active.fixed ? 1.0f : 0.0f;
        },
        to);
}

Tensor LoraEngine::text_strengths(size_t image) const {
    Tensor out({acts_ ? pack_->adapters().entries : 0, 1, 1, 1});
    if (acts_) {
        strengths_of(image, always, out.data.data());
    }
    return out;
}

Tensor LoraEngine::denoiser_strengths(int step, int steps, int64_t runs) const {
    const int64_t images = static_cast<int64_t>(state_.images.size());
    const int64_t entries = acts_ ? pack_->adapters().entries : 0;
    Tensor out({entries, images > 1 ? runs : 1, 1, 1});
    const auto acts = [&](const LoraUse & use) { return acts_at(use, step, steps); };
    for (int64_t run = 0; acts_ && run < out.ne[1]; ++run) {
        if (run < images) {
            strengths_of(static_cast<size_t>(run), acts, out.data.data() + run * entries);
        } else {
            std::copy_n(out.data.data() + (run - images) * entries, entries, out.data.data() + run * entries);
        }
    }
    return out;
}

// ---- questions -----------------------------------------------------------------------------------------

std::vector<LoraReport> LoraEngine::reports() const {
    std::vector<LoraReport> out;
    for (const auto & lora : loras_) {
        out.push_back(lora->report);
    }
    return out;
}

int64_t LoraEngine::control_inputs() const {
    int64_t most = 0;
    for (const ActiveUpdate & active : acts_ ? pack_->active() : std::vector<ActiveUpdate>()) {
        most = std::max(most, active.update->shape.inputs - matrix_shape(*active.update->target.weight).inputs);
    }
    return most;
}

std::string LoraEngine::text_identity(size_t image) const {
    std::string out;
    if (text_drift_ > 0) {
        out = text("drift %llu\n", static_cast<unsigned long long>(text_drift_));
    }
    if (state_.images.empty()) {
        return out;
    }
    for (const auto & lora : loras_) {
        const bool changes_text =
            std::any_of(lora->updates.begin(), lora->updates.end(),
                        [](const Update & update) { return is_text_weight(*update.target.weight); });
        for (const LoraUse & use : uses(image)) {
            if (changes_text && use.path == lora->path && use.text != decltype(use.text){}) {
                out += lora->stamp;
                for (const double multiplier : use.text) {
                    out += text("|%.17g", multiplier);
                }
                for (const LoraBlock & block : use.blocks) {
                    out += text("|%s=%.17g", block.prefix.c_str(), block.factor);
                }
                out += '\n';
            }
        }
    }
    return out;
}

} // namespace sd
