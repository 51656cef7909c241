// The exported calls: choice of instruction set, and sorting slots by expert.
#include <cstring>

#include "coterie.h"
#include "isa.h"

namespace coterie {
namespace {

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 1;
  }
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

const Isa* isa_at(int level) {
#if defined(__x86_64__)
  const Isa* all[] = {&isa_portable, &isa_avx2, &isa_avx512, &isa_avx512_bf16};
  return all[level];
#else
  return level == 0 ? &isa_portable : nullptr;
#endif
}

const Isa* chosen = isa_at(best_isa());

}  // namespace
}  // namespace coterie

extern "C" {

int coterie_forward(const CoterieMlp* mlp) { return coterie::chosen->forward(*mlp); }
int coterie_backward(const CoterieMlp* mlp) { return coterie::chosen->backward(*mlp); }
int coterie_low_bit(const CoterieMlp* mlp, const CoterieCodes* codes) {
  return coterie::chosen->low_bit(*mlp, codes);
}

int64_t coterie_prepacked_floats(int64_t experts, int64_t matrices, int64_t rows, int64_t cols, int32_t dtype) {
  return coterie::chosen->prepacked_floats(experts, matrices, rows, cols, dtype);
}

void coterie_prepack(const CoterieBank* bank, int64_t experts, int64_t matrices, int64_t rows, int64_t cols,
                     int32_t dtype, int32_t interleaved, int32_t threads, float* out) {
  coterie::chosen->prepack(*bank, experts, matrices, rows, cols, dtype, interleaved, threads, out);
}

double coterie_multiply_adds(int dtype, int threads) { return coterie::chosen->multiply_adds(dtype, threads); }

float coterie_read(const float* data, int64_t count, int threads) {
  return coterie::chosen->read_memory(data, count, threads);
}

const char* coterie_isa(int limit) {
  const int best = coterie::best_isa();
  coterie::chosen = coterie::isa_at(limit < best ? limit : best);
  return coterie::chosen->name;
}

void coterie_sort(const int64_t* ids, int64_t count, int64_t experts, int64_t* order, int32_t* ends) {
  const auto used = [&](int64_t id) { return id >= 0 && id < experts; };
  std::memset(ends, 0, experts * sizeof(int32_t));
  for (int64_t i = 0; i < count; ++i) {
    if (used(ids[i])) ++ends[ids[i]];
  }
  int32_t total = 0;
  for (int64_t e = 0; e < experts; ++e) {  // ends become starts, and starts ends as slots are placed
    const int32_t size = ends[e];
    ends[e] = total;
    total += size;
  }
  int64_t unused = total;
  for (int64_t i = 0; i < count; ++i) order[used(ids[i]) ? ends[ids[i]]++ : unused++] = i;
}
}
