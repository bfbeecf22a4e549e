#include "lora/lora_state.h"

#include "core/error.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace sd {
namespace {

bool same_block(const LoraBlock & a, const LoraBlock & b) {
    return a.prefix == b.prefix && a.factor == b.factor;
}

bool same_key(const LoraUse & a, const LoraUse & b) {
    return a.path == b.path && a.start == b.start && a.stop == b.stop &&
           std::equal(a.blocks.begin(), a.blocks.end(), b.blocks.begin(), b.blocks.end(), same_block);
}

bool block_before(const LoraBlock & a, const LoraBlock & b) {
    return std::tie(a.prefix, a.factor) < std::tie(b.prefix, b.factor);
}

bool before(const LoraUse & a, const LoraUse & b) {
    if (std::tie(a.path, a.start, a.stop) != std::tie(b.path, b.start, b.stop)) {
        return std::tie(a.path, a.start, a.stop) < std::tie(b.path, b.start, b.stop);
    }
    return std::lexicographical_compare(a.blocks.begin(), a.blocks.end(), b.blocks.begin(), b.blocks.end(),
                                        block_before);
}

void check(const LoraUse & use) {
    const auto finite = [&](double value, const char * what) {
        if (!std::isfinite(static_cast<float>(value))) {
            fail(Status::bad_argument, "%s: its %s is %g; multipliers are finite numbers", use.path.c_str(),
                 what, value);
        }
    };
    for (const double multiplier : use.text) {
        finite(multiplier, "multiplier for the text encoder");
    }
    finite(use.unet, "multiplier for the UNet");
    for (const LoraBlock & block : use.blocks) {
        finite(block.factor, ("weight of block '" + block.prefix + "'").c_str());
    }
    if (!(use.start >= 0 && use.stop <= 1 && use.start <= use.stop)) {
        fail(Status::bad_argument,
             "%s: steps from %g to %g are no range; start and stop are fractions, 0 <= start <= "
             "stop <= 1",
             use.path.c_str(), use.start, use.stop);
    }
}

// The multipliers of `other` on top, so many times.
void add(LoraUse & use, const LoraUse & other, double times) {
    for (size_t i = 0; i < use.text.size(); ++i) {
        use.text[i] += times * other.text[i];
    }
    use.unet += times * other.unet;
}

std::vector<LoraUse> canonical_list(std::vector<LoraUse> uses) {
    for (LoraUse & use : uses) {
        check(use);
        std::sort(use.blocks.begin(), use.blocks.end(), block_before);
    }
    // Equal keys are summed in the order of their multipliers, since sums of floats depend on it.
    std::sort(uses.begin(), uses.end(), [](const LoraUse & a, const LoraUse & b) {
        return same_key(a, b) ? std::tie(a.text, a.unet) < std::tie(b.text, b.unet) : before(a, b);
    });
    std::vector<LoraUse> out;
    for (LoraUse & use : uses) {
        if (!out.empty() && same_key(out.back(), use)) {
            add(out.back(), use, 1);
        } else {
            out.push_back(std::move(use));
        }
    }
    for (LoraUse & use : out) {
        use.unet = use.start < use.stop ? use.unet : 0;
        check(use); // a sum may overflow
    }
    out.erase(std::remove_if(out.begin(), out.end(),
                             [](const LoraUse & use) { return !use.acts(); }),
              out.end());
    return out;
}

bool starts_with(const std::string & text, const std::string & prefix) {
    return text.compare(0, prefix.size(), prefix) == 0;
}

// How many parts of the name lie below the path; −1 where the name does not.
std::ptrdiff_t depth_below(const std::string & name, const std::string & path) {
    if (!starts_with(name, path) ||
        (name.size() > path.size() && !path.empty() && name[path.size()] != '.')) {
        return -1;
    }
    return std::count(name.begin() + static_cast<std::ptrdiff_t>(path.size()), name.end(), '.');
}

} // namespace

LoraState canonical(const LoraState & state) {
    LoraState out;
    for (const std::vector<LoraUse> & uses : state.images) {
        out.images.push_back(canonical_list(uses));
    }
    const bool all_same = std::all_of(out.images.begin(), out.images.end(),
                                      [&](const auto & uses) { return uses == out.images.front(); });
    out.images.resize(all_same ? 1 : out.images.size());
    return out;
}

std::vector<LoraChange> lora_state_diff(const LoraState & current, const LoraState & wanted) {
    static const std::vector<LoraUse> none;
    const auto list = [](const LoraState & state, size_t image) -> const std::vector<LoraUse> & {
        return state.images.empty() ? none : state.images[state.images.size() == 1 ? 0 : image];
    };
    // A batch follows another one image by image; where the counts differ, the missing ones asked for
    // nothing.
    const size_t images = std::max({current.images.size(), wanted.images.size(), size_t{1}});
    std::vector<LoraChange> changes;
    for (size_t image = 0; image < images; ++image) {
        const bool ended = current.images.size() > 1 && image >= current.images.size();
        const bool left = wanted.images.size() > 1 && image >= wanted.images.size();
        const auto &from = ended ? none : list(current, image), &to = left ? none : list(wanted, image);
        auto a = from.begin();
        for (auto b = to.begin(); a != from.end() || b != to.end();) {
            LoraUse use;
            if (b == to.end() || (a != from.end() && before(*a, *b))) { // dropped
                use = *a;
                add(use, *a++, -2);
            } else if (a == from.end() || before(*b, *a)) {
                use = *b++;
            } else {
                use = *b;
                add(use, *a, -1);
                ++a;
                ++b;
            }
            if (use.acts()) {
                changes.push_back({image, std::move(use)});
            }
        }
    }
    return changes;
}

bool operator==(const LoraUse & a, const LoraUse & b) {
    return same_key(a, b) && a.text == b.text && a.unet == b.unet;
}

bool operator==(const LoraState & a, const LoraState & b) { return a.images == b.images; }

double multiplier_of(const LoraUse & use, const Weight & weight) {
    const LoraBlock * nearest = nullptr;
    std::ptrdiff_t depth = 0;
    for (const LoraBlock & block : use.blocks) {
        for (const std::string * name : {&weight.name, &weight.diffusers}) {
            if (block.prefix.empty() && name == &weight.diffusers) { // shorter, where it names what is fused
                continue;
            }
            const std::ptrdiff_t below = depth_below(*name, block.prefix);
            if (below >= 0 && (!nearest || below < depth)) {
                nearest = &block;
                depth = below;
            }
        }
    }
    const int encoder = text_encoder_of(weight);
    return (encoder < 0 ? use.unet : use.text[encoder]) * (nearest ? nearest->factor : 1);
}

bool acts_at(const LoraUse & use, int step, int steps) {
    const double rounding = 1e-9 * steps; // 0.7 · 10 is a little more than 7
    return step >= use.start * steps - rounding && (step < use.stop * steps - rounding || use.stop >= 1);
}

} // namespace sd
