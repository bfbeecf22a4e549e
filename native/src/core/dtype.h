// Element types as files name them. The numbers of ggml's types are ggml's own (they stand in GGUF files,
// and nn/weights.cpp asserts that they agree); types that only safetensors has follow behind 1000.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sd {

enum class DType : int32_t {
    f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q8_1 = 9,
    q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13, q6_k = 14, q8_k = 15,
    iq2_xxs = 16, iq2_xs = 17, iq3_xxs = 18, iq1_s = 19, iq4_nl = 20, iq3_s = 21, iq2_s = 22, iq4_xs = 23,
    i8 = 24, i16 = 25, i32 = 26, i64 = 27, f64 = 28, iq1_m = 29, bf16 = 30,
    tq1_0 = 34, tq2_0 = 35, mxfp4 = 39, nvfp4 = 40, q1_0 = 41, q2_0 = 42,
    f8_e4m3 = 1000, f8_e5m2 = 1001, boolean = 1002, u8 = 1003, u16 = 1004, u32 = 1005, u64 = 1006,
};

struct DTypeInfo {
    DType        type;
    const char * name;        // as ggml and the command line spell it
    int64_t      block;       // elements in a block, 1 where not quantised
    size_t       block_bytes; // bytes of a block
};

// Null where the number or name is no type that we know. Letters' case does not matter.
const DTypeInfo * dtype_info(int32_t type);
const DTypeInfo * dtype_by_name(const char * name);
const char *      dtype_name(DType type);
const DTypeInfo * dtype_at(int index); // all of them in turn; null past the end

inline bool is_quantised(DType type) { return dtype_info(static_cast<int32_t>(type))->block > 1; }

} // namespace sd
