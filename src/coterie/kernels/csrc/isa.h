// The instruction sets the library holds, poorest first.
#pragma once

#include "coterie.h"

namespace coterie {

struct Isa {
  const char* name;
  int (*forward)(const CoterieMlp&);
  int (*backward)(const CoterieMlp&);
  int (*low_bit)(const CoterieMlp&, const CoterieCodes*);
  long (*prepacked_floats)(long experts, long matrices, long rows, long cols, int dtype);
  void (*prepack)(const CoterieBank&, long experts, long matrices, long rows, long cols, int dtype,
                  bool interleaved, int threads, float* out);
  double (*multiply_adds)(int dtype, int threads);
  float (*read_memory)(const float* data, long count, int threads);
};

extern const Isa isa_portable, isa_avx2, isa_avx512, isa_avx512_bf16;

}  // namespace coterie
