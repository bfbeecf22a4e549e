#define SD_SET set_avx512
#define SD_SET_NAME "avx512"
#include "kernels/set.inl"
