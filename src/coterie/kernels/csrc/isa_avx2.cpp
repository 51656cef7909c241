// Compiled with -mavx2 -mfma: 16 registers hold 6×2 sums.
#define NAME "avx2"
#define KERNELS isa_avx2
#define LANES 8
#define ROWS 6
#define BF16_DOT 0
#include "kernels.h"
