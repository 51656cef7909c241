// out[e] = aᵀ·b over the rows of expert e: the gradient of a weight matrix.

template <class T>
struct Outer {
  Rows<T> a, b;    // [used, M], [used, N]
  long m, n;
  T* out;          // [E, M, N]
  const int32_t* ends;
  bool large;      // more than the caches hold
  volatile bool failed = false;

  static constexpr long MROWS = 8 * ROWS;      // rows of out per task
  static constexpr long NCOLUMNS = 8 * WIDTH;  // columns of out at a time
  static constexpr long DEEP = 2 * DEPTH;      // units of summed rows packed at a time

  bool run(long experts, int threads) {
    const long blocks = ceil_div(m, MROWS);
    auto task = [&](long t) { rows(t / blocks, t % blocks * MROWS); };
    parallel(experts * blocks, threads, task);
    return !failed;
  }

  void write(T* to, const float* from, long width) const {
    constexpr long line = 64 / sizeof(T);
    long c = 0;
    if (large && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
      for (; c + line <= width; c += line) {
        if constexpr (sizeof(T) == sizeof(float)) {
          for (long i = 0; i < line; i += LANES) store_past(to + c + i, load(from + c + i));
        } else {
          for (long i = 0; i < line; i += 2 * LANES) {
            store_past(to + c + i, load(from + c + i), load(from + c + i + LANES));
          }
        }
      }
    }
    for (; c < width; c += LANES) store_some(to + c, load(from + c), width - c);
  }

  void rows(long expert, long m0) {
    const long first = expert ? ends[expert - 1] : 0, count = ends[expert] - first;
    const long height = min(MROWS, m - m0);
    T* to = out + (expert * m + m0) * n;
    if (count == 0) return void(__builtin_memset(to, 0, height * n * sizeof(T)));
    auto* left = static_cast<float*>(scratch(0, (DEEP * MROWS + LANES) * sizeof(float)));
    auto* right = static_cast<float*>(scratch(1, DEEP * NCOLUMNS * sizeof(float)));
    auto* sums = static_cast<float*>(scratch(2, MROWS * NCOLUMNS * sizeof(float)));
    if (!left || !right || !sums) return void(failed = true);
    constexpr int PER = kPer<T>;
    for (long n0 = 0; n0 < n; n0 += NCOLUMNS) {
      const long width = min(NCOLUMNS, n - n0), panels = ceil_div(width, WIDTH);
      for (long r = 0; r < count; r += DEEP * PER) {
        const long some = min(DEEP * PER, count - r), deep = units<T>(some);
        if (n0 == 0 || count > DEEP * PER) {
          const Timed timed(kGradientRowsPacked);
          for (long i = 0; i < height; i += ROWS) {
            pack_tile_columns(a, first + r, some, m0 + i, static_cast<int>(min(ROWS, height - i)), left + i * deep);
          }
        }
        for (long j = 0; j < panels; ++j) {
          const Timed timed(kGradientRowsPacked);
          pack_panel_columns(b, first + r, some, n0 + j * WIDTH, width - j * WIDTH, right + j * deep * WIDTH);
        }
        for (long i = 0; i < height; i += ROWS) {
          const int tall = static_cast<int>(min(ROWS, height - i));
          const Tile run = tile_for<PER>(tall);
          const Timed timed(kGradientProducts);
          for (long j = 0; j < panels; ++j) {
            for (long u = 0; u < deep; u += DEPTH) {
              run(left + i * deep + u * tall, right + (j * deep + u) * WIDTH, min(DEPTH, deep - u),
                  sums + i * NCOLUMNS + j * WIDTH, NCOLUMNS, r + u > 0, reinterpret_cast<const char*>(left), 0, 0);
            }
          }
        }
      }
      const Timed timed(kGradientsWritten);
      for (long i = 0; i < height; ++i) write(to + i * n + n0, sums + i * NCOLUMNS, width);
    }
  }
};
