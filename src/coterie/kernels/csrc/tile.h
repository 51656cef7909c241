// Register tiles: m rows times WIDTH columns, summed over at most DEPTH units of k.
//
// The order of additions of one output element never depends on m, on the columns beside it or on which of
// the routines below computed it: k upwards within a block of DEPTH units, from zero; then the blocks. Short
// chains also keep the rounding error of a long sum near that of one block.

constexpr long DEPTH = 256;

template <int PER>
INLINE V multiply_add(float a, V b, V sum) {
#if BF16_DOT
  if (PER == 2) return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#endif
  return a * b + sum;
}

// c (+)= a·b for packed a [k][M] and b [k][WIDTH]; per k, one line of memory is brought near, and the one `pair`
// bytes after it.
template <int PER, int M>
void tile(const float* a, const float* b, long k, float* c, long ldc, bool add, const char* ahead, long step,
          long pair) {
  V sum[M][2] = {};
  for (long i = 0; i < k; ++i) {
    const V b0 = load(b), b1 = load(b + LANES);
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + pair, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      sum[r][0] = multiply_add<PER>(a[r], b0, sum[r][0]);
      sum[r][1] = multiply_add<PER>(a[r], b1, sum[r][1]);
    }
    a += M, b += WIDTH, ahead += step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) {
    float* out = c + r * ldc;
    store(out, add ? load(out) + sum[r][0] : sum[r][0]);
    store(out + LANES, add ? load(out + LANES) + sum[r][1] : sum[r][1]);
  }
}

using Tile = void (*)(const float*, const float*, long, float*, long, bool, const char*, long, long);

template <int PER, int M = ROWS>
INLINE Tile tile_for(int m) {
  if constexpr (M == 1) {
    return tile<PER, 1>;
  } else {
    return m == M ? tile<PER, M> : tile_for<PER, M - 1>(m);
  }
}

// Few rows: the weights go through registers once, transposed there, and no packed copy is written. With more
// than four rows the sums no longer fit beside the block being transposed.
constexpr int FEW = 4;

// c = a·bᵀ for packed a [k][M] and LANES rows of b, k elements each, `valid` of them real.
template <class T, int M>
void stream(const float* a, const T* rows, long row, long valid, long k, float* c, long ldc,
            Prefetch& ahead) {
  constexpr int PER = kPer<T>;
  const long count = units<T>(k);
  for (long block = 0; block < count; block += DEPTH) {
    const long end = min(count, block + DEPTH);
    V sum[M] = {};
    for (long u = block; u < end; u += LANES) {
      V v[LANES];
      long step;
      const char* line = ahead.take(LANES, a, &step);
      const long left = k - u * PER;
      if (left >= LANES * PER && valid >= LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) {
          v[i] = load_units(rows + i * row + u * PER, LANES * PER);
          __builtin_prefetch(line + i * step, 0, 2);
        }
      } else {
        for (int i = 0; i < LANES; ++i) v[i] = i < valid ? load_units(rows + i * row + u * PER, left) : V{};
      }
      transpose(v);
      if (end - u >= LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) {
#pragma GCC unroll 4
          for (int r = 0; r < M; ++r) sum[r] = multiply_add<PER>(a[(u + i) * M + r], v[i], sum[r]);
        }
      } else {
        for (int i = 0; i < end - u; ++i) {
          for (int r = 0; r < M; ++r) sum[r] = multiply_add<PER>(a[(u + i) * M + r], v[i], sum[r]);
        }
      }
    }
    for (int r = 0; r < M; ++r) store(c + r * ldc, block ? load(c + r * ldc) + sum[r] : sum[r]);
  }
}

template <class T, int M = FEW>
INLINE void stream_rows(int m, const float* a, const T* rows, long row, long valid, long k, float* c,
                        long ldc, Prefetch& ahead) {
  if constexpr (M > 1) {
    if (m < M) return stream_rows<T, M - 1>(m, a, rows, row, valid, k, c, ldc, ahead);
  }
  stream<T, M>(a, rows, row, valid, k, c, ldc, ahead);
}
