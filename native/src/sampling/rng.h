// The two generators of normal noise that people compare pictures with: torch on a CPU and torch on CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace sd {

class Rng {
  public:
    virtual ~Rng() = default;
    // Fills `out` as one call of torch.randn(n) would; later calls go on in the same stream.
    virtual void normal(float * out, size_t n) = 0;
};

// "cpu" or "cuda"; throws Error(bad_argument) naming the known ones.
std::unique_ptr<Rng> make_rng(const std::string & name, uint64_t seed);

// The names, the first being the default.
const std::vector<std::string> & rng_names();

} // namespace sd
