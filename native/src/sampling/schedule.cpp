// The conventions are those of k-diffusion and ComfyUI, whose users know the names; a comment tells where
// diffusers differs. Sums are in double: sigmas are float only at the end.
#include "sampling/schedule.h"

#include "sampling/named_table.h"

#include <algorithm>
#include <cmath>

namespace sd {

const std::vector<float> & align_your_steps_sd1() {
    static const std::vector<float> levels = {14.615f, 6.475f, 3.861f, 2.697f, 1.886f, 1.396f,
                                              0.963f,  0.652f, 0.399f, 0.152f, 0.029f};
    return levels;
}

const std::vector<float> & align_your_steps_sdxl() {
    static const std::vector<float> levels = {14.615f, 6.315f, 3.771f, 2.181f, 1.342f, 0.862f,
                                              0.555f,  0.380f, 0.234f, 0.113f, 0.029f};
    return levels;
}

NoiseSchedule NoiseSchedule::scaled_linear(const std::vector<float> & aligned, bool zero_snr) {
    constexpr int    timesteps = 1000;
    constexpr double first = 0.00085, last = 0.012;

    NoiseSchedule schedule;
    schedule.aligned_ = aligned;
    std::vector<double> kept; // sqrt(alpha_bar): the share of the clean latent
    double              alpha_bar = 1;
    for (int t = 0; t < timesteps; ++t) {
        const double root = std::sqrt(first) + (std::sqrt(last) - std::sqrt(first)) * t / (timesteps - 1);
        alpha_bar *= 1 - root * root;
        kept.push_back(std::sqrt(alpha_bar));
    }
    if (zero_snr) {
        const double begin = kept.front(), end = kept.back();
        for (double & share : kept) {
            share = (share - end) * begin / (begin - end);
        }
        kept.back() = std::ldexp(1.0, -12);
    }
    for (const double share : kept) {
        const double sigma = std::sqrt(1 - share * share) / share;
        schedule.sigmas_.push_back(static_cast<float>(sigma));
        schedule.log_sigmas_.push_back(std::log(sigma));
    }
    return schedule;
}

NoiseSchedule NoiseSchedule::flow(double shift, bool shifts_once) {
    constexpr int levels = 1000;

    NoiseSchedule schedule;
    schedule.shift_ = shift;
    schedule.shifts_once_ = shifts_once;
    for (int t = 0; t < levels; ++t) {
        schedule.sigmas_.push_back(schedule.sigma(t));
    }
    return schedule;
}

float NoiseSchedule::sigma(double timestep) const {
    if (is_flow()) {
        const double t = std::clamp((timestep + 1) / 1000, 0.0, 1.0);
        return static_cast<float>(shift_ * t / (1 + (shift_ - 1) * t));
    }
    const double last = static_cast<double>(sigmas_.size() - 1);
    if (!(timestep > 0)) {
        return sigmas_.front();
    }
    if (timestep >= last) {
        return sigmas_.back();
    }
    const size_t low  = static_cast<size_t>(timestep);
    const double part = timestep - static_cast<double>(low);
    return static_cast<float>(std::exp((1 - part) * log_sigmas_[low] + part * log_sigmas_[low + 1]));
}

float NoiseSchedule::timestep(double sigma) const {
    if (is_flow()) {
        return static_cast<float>(1000 * sigma);
    }
    if (!(sigma > sigmas_.front())) {
        return 0;
    }
    if (sigma >= sigmas_.back()) {
        return static_cast<float>(sigmas_.size() - 1);
    }
    const double log_sigma = std::log(sigma);
    const auto   above     = std::upper_bound(log_sigmas_.begin() + 1, log_sigmas_.end() - 1, log_sigma);
    const double part      = (log_sigma - above[-1]) / (above[0] - above[-1]);
    return static_cast<float>(static_cast<double>(above - log_sigmas_.begin()) - 1 + part);
}

namespace {

// Value k of n evenly spaced ones from `first` to `last`; of a single one, the first.
double spaced(double first, double last, int k, int n) {
    return n == 1 ? first : first + (last - first) * k / (n - 1);
}

int last_timestep(const NoiseSchedule & trained) {
    return static_cast<int>(trained.sigmas().size()) - 1;
}

void check_has_levels(const char * scheduler, const NoiseSchedule & trained, int steps) {
    const int levels = last_timestep(trained) + 1;
    if (steps > levels) {
        fail(Status::bad_argument,
             "steps %d: scheduler '%s' picks from %d noise levels; ask for no more steps, or use 'normal'",
             steps, scheduler, levels);
    }
}

// Evenly spaced timesteps, both ends included: diffusers' "linspace".
std::vector<float> normal(const NoiseSchedule & trained, int steps) {
    std::vector<float> sigmas;
    for (int k = 0; k < steps; ++k) {
        sigmas.push_back(trained.sigma(spaced(last_timestep(trained), trained.first_timestep(), k, steps)));
    }
    return sigmas;
}

// Karras 2022, eq. 5, rho = 7.
std::vector<float> karras(const NoiseSchedule & trained, int steps) {
    constexpr double   rho   = 7;
    const double       first = std::pow(static_cast<double>(trained.sigmas().back()), 1 / rho);
    const double       last  = std::pow(static_cast<double>(trained.sigmas().front()), 1 / rho);
    std::vector<float> sigmas;
    for (int k = 0; k < steps; ++k) {
        sigmas.push_back(static_cast<float>(std::pow(spaced(first, last, k, steps), rho)));
    }
    return sigmas;
}

// Evenly spaced in log(sigma).
std::vector<float> exponential(const NoiseSchedule & trained, int steps) {
    const double       first = std::log(trained.sigmas().back()), last = std::log(trained.sigmas().front());
    std::vector<float> sigmas;
    for (int k = 0; k < steps; ++k) {
        sigmas.push_back(static_cast<float>(std::exp(spaced(first, last, k, steps))));
    }
    return sigmas;
}

// As "normal" with one step more, whose last level is left out. (diffusers' "trailing" is rounded.)
std::vector<float> sgm_uniform(const NoiseSchedule & trained, int steps) {
    std::vector<float> sigmas = normal(trained, steps + 1);
    sigmas.pop_back();
    return sigmas;
}

// Every (levels / steps)-th level from the top, as in ComfyUI; diffusers' "trailing" where that is whole. A flow has
// the levels between as well: these are the ones of diffusers' pipeline for FLUX.
std::vector<float> simple(const NoiseSchedule & trained, int steps) {
    if (trained.is_flow()) {
        std::vector<float> sigmas;
        for (int k = 0; k < steps; ++k) {
            sigmas.push_back(trained.sigma(1000.0 * (steps - k) / steps - 1));
        }
        return sigmas;
    }
    check_has_levels("simple", trained, steps);
    const double       stride = static_cast<double>(trained.sigmas().size()) / steps;
    std::vector<float> sigmas;
    for (int k = 0; k < steps; ++k) {
        sigmas.push_back(trained.sigmas()[trained.sigmas().size() - 1 - static_cast<size_t>(k * stride)]);
    }
    return sigmas;
}

// Timesteps 1, 1 + stride, ..., as DDIM was published: diffusers' "leading" with an offset of 1. ComfyUI goes
// on to the last level, which gives more steps than were asked for where these do not divide 1,000.
std::vector<float> ddim_uniform(const NoiseSchedule & trained, int steps) {
    check_has_levels("ddim_uniform", trained, steps);
    const int          last   = last_timestep(trained);
    const int          stride = (last + 1) / steps;
    const int          first  = std::min(1, last - (steps - 1) * stride); // 0 if every level is asked for
    std::vector<float> sigmas;
    for (int k = steps - 1; k >= 0; --k) {
        sigmas.push_back(trained.sigmas()[static_cast<size_t>(first + k * stride)]);
    }
    return sigmas;
}

// x such that a share p of the distribution Beta(a, a) lies below it.
double symmetric_beta_quantile(double a, double p) {
    if (p == 0.5) {
        return 0.5;
    }
    if (p > 0.5) {
        return 1 - symmetric_beta_quantile(a, 1 - p);
    }
    // In y = x^a the distribution function is y / (a B) times a series whose terms halve at least (x < 1/2).
    // It is convex for a < 1: Newton's method from the right of the root cannot miss it.
    const double scale = a * std::exp(2 * std::lgamma(a) - std::lgamma(2 * a)); // a B(a, a)
    double       y     = std::min(p * scale, std::pow(0.5, a));
    for (int round = 0; round < 8; ++round) {
        const double x    = std::pow(y, 1 / a);
        double       term = 1, sum = 1;
        for (int n = 1; n < 60; ++n) {
            term *= (n - a) / n * x;
            sum  += term * a / (a + n);
        }
        y -= (y * sum - p * scale) / std::pow(1 - x, a - 1);
    }
    return std::pow(y, 1 / a);
}

// Timesteps at quantiles of Beta(0.6, 0.6), dense at both ends (Lee 2024, "Beta Sampling is All You Need").
// Rounded to whole ones, as in ComfyUI, unless two would fall together. (diffusers' quantiles are of sigma.)
std::vector<float> beta(const NoiseSchedule & trained, int steps) {
    std::vector<double> exact, rounded;
    for (int k = 0; k < steps; ++k) {
        const double share = 1 - static_cast<double>(k) / steps;
        exact.push_back(last_timestep(trained) * symmetric_beta_quantile(0.6, share));
        rounded.push_back(std::nearbyint(exact.back()));
    }
    const bool         distinct = std::adjacent_find(rounded.begin(), rounded.end()) == rounded.end();
    std::vector<float> sigmas;
    for (const double timestep : distinct ? rounded : exact) {
        sigmas.push_back(trained.sigma(timestep));
    }
    return sigmas;
}

// The table's levels are for ten steps; for other numbers interpolated in log(sigma), as its authors say.
// The last of them gives way to 0.
std::vector<float> align_your_steps(const NoiseSchedule & trained, int steps) {
    const std::vector<float> & levels = trained.aligned();
    if (levels.empty()) {
        fail(Status::unsupported, "scheduler 'ays' has no levels for this kind of model; try 'karras'");
    }
    std::vector<float> sigmas;
    for (int k = 0; k < steps; ++k) {
        const double at   = static_cast<double>(levels.size() - 1) * k / steps;
        const size_t low  = static_cast<size_t>(at);
        const double part = at - static_cast<double>(low);
        sigmas.push_back(static_cast<float>(std::exp((1 - part) * std::log(static_cast<double>(levels[low])) +
                                                     part * std::log(static_cast<double>(levels[low + 1])))));
    }
    return sigmas;
}

struct Scheduler {
    const char * name;
    std::vector<float> (*levels)(const NoiseSchedule & trained, int steps); // [steps], without the last 0
};

const Scheduler schedulers[] = {
    {"normal",       normal},
    {"karras",       karras},
    {"exponential",  exponential},
    {"sgm_uniform",  sgm_uniform},
    {"simple",       simple},
    {"ddim_uniform", ddim_uniform},
    {"beta",         beta},
    {"ays",          align_your_steps},
};

} // namespace

std::vector<float> make_sigmas(const std::string & scheduler, const NoiseSchedule & trained, int steps) {
    constexpr int most = 10000; // the levels of far more would no longer differ as floats
    const auto &  row  = find_named("scheduler", schedulers, scheduler);
    if (steps < 1 || steps > most) {
        fail(Status::bad_argument, "steps %d: must be between 1 and %d", steps, most);
    }
    std::vector<float> sigmas = row.levels(trained, steps);
    sigmas.push_back(0);
    return sigmas;
}

const std::vector<std::string> & scheduler_names() {
    static const std::vector<std::string> names = names_of(schedulers);
    return names;
}

} // namespace sd
