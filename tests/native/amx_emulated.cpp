// The kernels of AMX with tiles that are arrays, so that any machine of AVX-512 with bf16 can test them.
#if defined(__AVX512BF16__)
#define SD_SET set_amx_emulated
#define SD_SET_NAME "amx, emulated"
#define SD_BF16
#define SD_AMX
#define SD_AMX_EMULATED
#include "kernels/set.inl"
#endif
