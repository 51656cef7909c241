// The kernels for one instruction set. The including file has set LANES (floats per vector), ROWS (of a
// register tile, ≤ LANES), BF16_DOT (whether bfloat16 dot products exist) and NAME.

#include <cstddef>
#include <cstdint>

#if LANES == 16
#include <immintrin.h>
#endif

#include "coterie.h"
#include "isa.h"
#include "memory.h"
#include "profile.h"
#include "threads.h"

namespace coterie {
namespace {  // a copy for each instruction set

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

template <bool, class Yes, class>
struct Choose {
  using type = Yes;
};
template <class Yes, class No>
struct Choose<false, Yes, No> {
  using type = No;
};

// clang-format off: in this order
#include "simd.h"
#include "activation.h"
#include "pack.h"
#include "tile.h"
#include "panel.h"
#include "forward.h"
#include "low_bit_block.h"
#include "low_bit.h"
#include "outer.h"
#include "backward.h"
#include "floor.h"
// clang-format on

int run_forward(const CoterieMlp& p) { return p.dtype ? forward<bf16>(p) : forward<float>(p); }
int run_backward(const CoterieMlp& p) { return p.dtype ? backward<bf16>(p) : backward<float>(p); }
int run_low_bit(const CoterieMlp& p, const CoterieCodes* codes) {
  return p.dtype ? low_bit<bf16>(p, codes) : low_bit<float>(p, codes);
}
long run_prepacked_floats(long experts, long matrices, long rows, long cols, int dtype) {
  return experts * matrices * (dtype ? matrix_floats<bf16>(rows, cols) : matrix_floats<float>(rows, cols));
}
void run_prepack(const CoterieBank& bank, long experts, long matrices, long rows, long cols, int dtype,
                 bool interleaved, int threads, float* out) {
  if (dtype) prepack<bf16>(bank, experts, matrices, interleaved, rows, cols, threads, out);
  else prepack<float>(bank, experts, matrices, interleaved, rows, cols, threads, out);
}
double run_multiply_adds(int dtype, int threads) {
  return dtype ? multiply_adds<kPer<bf16>>(threads) : multiply_adds<1>(threads);
}

}  // namespace

extern const Isa KERNELS;
const Isa KERNELS = {NAME, run_forward, run_backward, run_low_bit, run_prepacked_floats, run_prepack, run_multiply_adds, read_memory};

}  // namespace coterie
