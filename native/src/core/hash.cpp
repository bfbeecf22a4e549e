#include "core/hash.h"

#include "core/error.h"

#include <cstring>

namespace sd {
namespace {

// An odd multiplier and a shift are each invertible, so a change in any one word changes its lane.
uint64_t mix(uint64_t lane, uint64_t word) {
    lane = (lane ^ word) * 0x9fb21c651e98df25;
    return lane ^ (lane >> 29);
}

} // namespace

void Checksum::add(const void * data, size_t bytes) {
    const auto * at = static_cast<const uint8_t *>(data);
    uint64_t     words[4];
    size_t       left = bytes;
    for (; left >= sizeof words; left -= sizeof words, at += sizeof words) {
        std::memcpy(words, at, sizeof words);
        for (int i = 0; i < 4; ++i) {
            lanes_[i] = mix(lanes_[i], words[i]);
        }
    }
    std::memset(words, 0, sizeof words);
    if (left > 0) {
        std::memcpy(words, at, left);
    }
    for (int i = 0; i < 4; ++i) {
        lanes_[i] = mix(mix(lanes_[i], words[i]), bytes);
    }
}

std::string Checksum::hex() const {
    // Each lane saw a quarter of the words; let every one of them reach all digits.
    uint64_t out[4] = {lanes_[0], lanes_[1], lanes_[2], lanes_[3]};
    for (int round = 0; round < 4; ++round) {
        for (int i = 0; i < 4; ++i) {
            out[(i + 1) % 4] = mix(out[(i + 1) % 4], out[i]);
        }
    }
    std::string digits;
    for (const uint64_t word : out) {
        digits += text("%016llx", static_cast<unsigned long long>(word));
    }
    return digits;
}

} // namespace sd
