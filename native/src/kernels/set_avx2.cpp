#define SD_SET set_avx2
#define SD_SET_NAME "avx2"
#include "kernels/set.inl"
