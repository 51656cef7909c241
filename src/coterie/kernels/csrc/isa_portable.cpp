// Any processor: 128-bit vectors, which every 64-bit one has.
#define NAME "portable"
#define KERNELS isa_portable
#define LANES 4
#define ROWS 4
#define BF16_DOT 0
#include "kernels.h"
