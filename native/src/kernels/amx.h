// The tile registers of AMX: eight, of 16 rows of 64 bytes. The intrinsics of compilers want their numbers as literals and
// let accesses to memory pass by; these do neither. Where SD_AMX_EMULATED, they are arrays, for tests on any machine.
#pragma once

#include "kernels/simd.h"

namespace sd {
namespace {

#if defined(SD_AMX_EMULATED)

struct Tile {
    uint16_t halves[16][32];
    float    floats[16][16];
};
thread_local Tile tiles[8];

SD_INLINE void configure_tiles() {}
SD_INLINE void release_tiles() {}

template <int tile> SD_INLINE void load_tile(const void * from, int64_t stride) {
    for (int i = 0; i < 16; ++i) {
        std::memcpy(tiles[tile].halves[i], static_cast<const char *>(from) + i * stride, 64);
        std::memcpy(tiles[tile].floats[i], static_cast<const char *>(from) + i * stride, 64);
    }
}

template <int tile> SD_INLINE void store_tile(void * to, int64_t stride) {
    for (int i = 0; i < 16; ++i) {
        std::memcpy(static_cast<char *>(to) + i * stride, tiles[tile].floats[i], 64);
    }
}

template <int tile> SD_INLINE void zero_tile() { std::memset(tiles[tile].floats, 0, sizeof tiles[tile].floats); }

template <int to, int a, int b> SD_INLINE void multiply_tiles() {
    const auto value = [](uint16_t half) {
        const uint32_t raw = uint32_t{half} << 16;
        float          out;
        std::memcpy(&out, &raw, sizeof out);
        return out;
    };
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 16; ++n) {
            for (int k = 0; k < 32; ++k) {
                tiles[to].floats[m][n] += value(tiles[a].halves[m][k]) * value(tiles[b].halves[k / 2][2 * n + k % 2]);
            }
        }
    }
}

#else

struct alignas(64) TileConfiguration {
    uint8_t  palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t  rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

SD_INLINE void configure_tiles() {
    const TileConfiguration configuration;
    asm volatile("ldtilecfg %0" : : "m"(configuration));
}
SD_INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int tile> SD_INLINE void load_tile(const void * from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile> SD_INLINE void store_tile(void * to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}

template <int tile> SD_INLINE void zero_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(tile)); }

// Tile `to` += a times b: rows of 32 bf16 times 16 rows of 16 pairs of them.
template <int to, int a, int b> SD_INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(to), "i"(a), "i"(b));
}

#endif

} // namespace
} // namespace sd
