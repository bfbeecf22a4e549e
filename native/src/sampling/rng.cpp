// The bits are those of torch; logarithm, sine and cosine are libm's, so last places may differ.
#include "sampling/rng.h"

#include "sampling/named_table.h"

#include <array>
#include <cmath>
#include <optional>
#include <random>

namespace sd {
namespace {

constexpr double two_pi = 6.283185307179586;

// torch on a CPU: MT19937 and Box-Muller, in blocks of 16 floats, or for fewer numbers in pairs of doubles.
class CpuRng final : public Rng {
  public:
    explicit CpuRng(uint64_t seed) : bits_(static_cast<uint32_t>(seed)) {} // the low half only, as torch

    void normal(float * out, size_t n) override {
        if (n < 16) {
            for (size_t i = 0; i < n; ++i) {
                out[i] = static_cast<float>(next());
            }
            return;
        }
        for (size_t i = 0; i < n; ++i) {
            out[i] = uniform();
        }
        for (size_t i = 0; i + 16 <= n; i += 16) {
            transform_block(out + i);
        }
        if (n % 16 != 0) { // the last 16 anew, from fresh bits, over a part of the block before
            for (size_t i = n - 16; i < n; ++i) {
                out[i] = uniform();
            }
            transform_block(out + n - 16);
        }
    }

  private:
    float uniform() { return static_cast<float>(bits_() & 0xffffff) * 0x1p-24f; }

    double uniform_double() {
        const uint64_t high = bits_(), low = bits_();
        return static_cast<double>((high << 32 | low) & 0x1fffffffffffff) * 0x1p-53;
    }

    // Rounds where torch does: the angle and the logarithm are floats.
    static void transform_block(float * block) {
        for (int i = 0; i < 8; ++i) {
            const float log_u  = static_cast<float>(std::log(static_cast<double>(1.0f - block[i])));
            const float radius = std::sqrt(-2.0f * log_u);
            const float angle  = static_cast<float>(two_pi) * block[i + 8];
            block[i]     = radius * static_cast<float>(std::cos(static_cast<double>(angle)));
            block[i + 8] = radius * static_cast<float>(std::sin(static_cast<double>(angle)));
        }
    }

    double next() {
        if (spare_) {
            const double value = *spare_;
            spare_.reset();
            return value;
        }
        const double angle  = two_pi * uniform_double();
        const double radius = std::sqrt(-2.0 * std::log1p(-uniform_double()));
        spare_ = radius * std::sin(angle);
        return radius * std::cos(angle);
    }

    std::mt19937          bits_;
    std::optional<double> spare_; // second of a pair, waiting for the next call
};

// Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * counter[0];
        const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
        counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                   static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    return counter;
}

// torch on CUDA: number i is the first of four that thread i draws; each call advances the counter by one.
// So it is while a device has n threads; beyond (100,000 or more) torch's own numbers depend on the device.
class CudaRng final : public Rng {
  public:
    explicit CudaRng(uint64_t seed) : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)} {}

    void normal(float * out, size_t n) override {
        for (uint64_t i = 0; i < n; ++i) {
            const auto bits = philox({static_cast<uint32_t>(call_), static_cast<uint32_t>(call_ >> 32),
                                      static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32)}, key_);
            out[i] = box_muller(bits[0], bits[1]);
        }
        ++call_;
    }

  private:
    // Floats and fused steps as in cuRAND; its sine is the GPU's fast one, good to some 5e-7.
    static float box_muller(uint32_t x, uint32_t y) {
        constexpr float step = 0x1p-32f, turn = static_cast<float>(two_pi) * 0x1p-32f;
        const float u     = std::fma(static_cast<float>(x), step, step / 2);
        const float angle = std::fma(static_cast<float>(y), turn, turn / 2);
        const float log_u = static_cast<float>(std::log(static_cast<double>(u)));
        return std::sqrt(-2.0f * log_u) * static_cast<float>(std::sin(static_cast<double>(angle)));
    }

    std::array<uint32_t, 2> key_;
    uint64_t                call_ = 0;
};

struct RngKind {
    const char * name;
    std::unique_ptr<Rng> (*make)(uint64_t seed);
};

const RngKind rng_kinds[] = {
    {"cpu",  [](uint64_t seed) -> std::unique_ptr<Rng> { return std::make_unique<CpuRng>(seed); }},
    {"cuda", [](uint64_t seed) -> std::unique_ptr<Rng> { return std::make_unique<CudaRng>(seed); }},
};

} // namespace

std::unique_ptr<Rng> make_rng(const std::string & name, uint64_t seed) {
    return find_named("rng", rng_kinds, name).make(seed);
}

const std::vector<std::string> & rng_names() {
    static const std::vector<std::string> names = names_of(rng_kinds);
    return names;
}

} // namespace sd
