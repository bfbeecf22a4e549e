// Products on AMX's tiles, their factors rounded to bf16; all else as avx512.
#define SD_SET set_amx
#define SD_SET_NAME "amx"
#define SD_BF16
#define SD_AMX
#include "kernels/set.inl"
