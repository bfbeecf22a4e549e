// Products round their factors to bf16 and sum in f32; all else as avx512.
#define SD_SET set_avx512_bf16
#define SD_SET_NAME "avx512"
#define SD_BF16
#include "kernels/set.inl"
