// What the machine itself can do, for benchmarks: multiply-adds in registers, and reading memory.

constexpr long kFloorSteps = 1l << 20;

// Runs multiply-adds on every thread; returns how many multiplications there were, each with an addition.
template <int PER>
double multiply_adds(int threads) {
  auto task = [](long) {
    constexpr int chains = ROWS < 12 ? ROWS * 2 : 24;
    V sum[chains];
    for (int c = 0; c < chains; ++c) sum[c] = splat(static_cast<float>(c));  // or the compiler sees one chain
    V b = splat(1.0f);
    for (long i = 0; i < kFloorSteps; ++i) {
#pragma GCC unroll 24
      for (int c = 0; c < chains; ++c) sum[c] = multiply_add<PER>(0.5f, b, sum[c]);
    }
    V total = {};
    for (const V& v : sum) total += v;
    *static_cast<volatile float*>(static_cast<float*>(scratch(0, 64))) = sum_lanes(total);
  };
  parallel(threads, threads, task);
  return double(threads) * kFloorSteps * (ROWS < 12 ? ROWS * 2 : 24) * LANES * PER;
}

// Reads every byte once on every thread, a part each.
float read_memory(const float* data, long count, int threads) {
  auto* totals = static_cast<float*>(allocate(threads * sizeof(float)));
  auto task = [&](long t) {
    const Range part(count / (8 * LANES), threads, t);
    V sum[8] = {};
    for (long i = part.begin; i < part.end; ++i) {
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) sum[c] += load(data + (i * 8 + c) * LANES);
    }
    V total = {};
    for (const V& v : sum) total += v;
    totals[t] = sum_lanes(total);
  };
  if (!totals) return 0;
  parallel(threads, threads, task);
  const float first = totals[0];
  release(totals);
  return first;
}
