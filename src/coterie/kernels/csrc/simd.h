// Vectors of LANES floats in the compiler's own vector types: the same source for every instruction set.
// Included by kernels.h inside that set's namespace. Nothing here or in its siblings may use a template
// or inline function of the standard library: the linker keeps one copy of those, and it could be the
// one compiled for the newest processor.

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));
typedef float VMem __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint32_t VUMem __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t VHMem __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

typedef uint16_t bf16;

#define INLINE inline __attribute__((always_inline))

INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }

INLINE V load(const float* p) { return *reinterpret_cast<const VMem*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<VMem*>(p) = v; }
INLINE V splat(float x) { return x - V{}; }

INLINE V widen(VH h) { return (V)(__builtin_convertvector(h, VU) << 16); }

// Round to nearest even; a NaN stays a NaN.
INLINE VH narrow(V v) {
  const VU bits = (VU)v;
  const VU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VU quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((VU)(v == v ? (VI)rounded : (VI)quiet), VH);
}

// Past the caches, where the processor can: for results larger than they are. p is aligned to 64 bytes.
INLINE void store_past(float* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#else
  store(p, v);
#endif
}
INLINE void store_past(bf16* p, V first, V second) {
#if defined(__AVX512F__)
  alignas(64) bf16 line[2 * LANES];
  *reinterpret_cast<VHMem*>(line) = narrow(first);
  *reinterpret_cast<VHMem*>(line + LANES) = narrow(second);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<const __m512i*>(line));
#else
  *reinterpret_cast<VHMem*>(p) = narrow(first);
  *reinterpret_cast<VHMem*>(p + LANES) = narrow(second);
#endif
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// LANES elements as floats, and back.
INLINE V load(const bf16* p) { return widen(*reinterpret_cast<const VHMem*>(p)); }
INLINE void store(bf16* p, V v) { *reinterpret_cast<VHMem*>(p) = narrow(v); }

// The first n < LANES elements; zeros after them.
template <class T>
INLINE V load_part(const T* p, long n) {
  T part[LANES] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
INLINE void store_part(T* p, V v, long n) {
  T part[LANES];
  store(part, v);
  __builtin_memcpy(p, part, n * sizeof(T));
}

// Up to LANES elements of a row that has `left` elements from p on.
template <class T>
INLINE V load_some(const T* p, long left) {
  return left >= LANES ? load(p) : left > 0 ? load_part(p, left) : V{};
}
template <class T>
INLINE void store_some(T* p, V v, long left) {
  if (left >= LANES) store(p, v);
  else if (left > 0) store_part(p, v, left);
}

INLINE float sum_lanes(V v) {
  float lanes[LANES];
  store(lanes, v);
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

#if LANES == 16
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#define EVEN_LANES 0, 2, 4, 6
#define ODD_LANES 1, 3, 5, 7
#endif

#ifdef __clang__
INLINE V interleave_low(V a, V b) { return __builtin_shufflevector(a, b, LOW_HALVES); }
INLINE V interleave_high(V a, V b) { return __builtin_shufflevector(a, b, HIGH_HALVES); }
INLINE V even_lanes(V a, V b) { return __builtin_shufflevector(a, b, EVEN_LANES); }
INLINE V odd_lanes(V a, V b) { return __builtin_shufflevector(a, b, ODD_LANES); }
#else
INLINE V interleave_low(V a, V b) { return __builtin_shuffle(a, b, (VI){LOW_HALVES}); }
INLINE V interleave_high(V a, V b) { return __builtin_shuffle(a, b, (VI){HIGH_HALVES}); }
INLINE V even_lanes(V a, V b) { return __builtin_shuffle(a, b, (VI){EVEN_LANES}); }
INLINE V odd_lanes(V a, V b) { return __builtin_shuffle(a, b, (VI){ODD_LANES}); }
#endif

// v[i][j] ↔ v[j][i]: log2(LANES) perfect shuffles of the whole block.
INLINE void transpose(V (&v)[LANES]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < LANES; stage *= 2) {
    V t[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      t[2 * i] = interleave_low(v[i], v[i + LANES / 2]);
      t[2 * i + 1] = interleave_high(v[i], v[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) v[i] = t[i];
  }
}
