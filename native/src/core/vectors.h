// SD_WIDE_VECTORS: the package is built for any x86-64; a function marked so is compiled once more for each
// wider set of vector instructions, and the right one is chosen as the library loads. Results are the same
// bits: without fused multiplication, which these builds do not use, only the number of elements at a time
// differs.
#pragma once

#include <cstdint> // which tells of glibc

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) &&                 \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SD_WIDE_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SD_WIDE_VECTORS
#endif
