// As isa_avx512.cpp with -mavx512bf16: bfloat16 pairs are multiplied and summed in float32 directly.
#define NAME "avx512-bf16"
#define KERNELS isa_avx512_bf16
#define LANES 16
#define ROWS 14
#define BF16_DOT 1
#include "kernels.h"
