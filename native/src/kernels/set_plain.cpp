// Whatever the compiler makes of vectors of four floats: SSE2 or NEON.
#define SD_SET set_plain
#define SD_SET_NAME "plain"
#include "kernels/set.inl"
