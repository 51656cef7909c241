// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl: 32 registers hold 14×2 sums.
#define NAME "avx512"
#define KERNELS isa_avx512
#define LANES 16
#define ROWS 14
#define BF16_DOT 0
#include "kernels.h"
