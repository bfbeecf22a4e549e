// A 256-bit checksum of bytes, fast enough for gigabytes. It detects change; it is no cryptographic hash.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sd {

class Checksum {
  public:
    void        add(const void * data, size_t bytes);
    std::string hex() const; // 64 digits

  private:
    uint64_t lanes_[4] = {0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9, 0x27d4eb2f165667c5};
};

} // namespace sd
