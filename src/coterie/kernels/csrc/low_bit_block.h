// 16 rows of a packed low-bit matrix times a few rows of tokens; codes become numbers in registers only.
//
// A unit is 16 rows × 32 columns: BITS vectors of sixteen 32-bit words, one word of each for every row. Even
// columns lie in a word's lower half, odd ones in its upper half, lowest columns in the lowest bits: a shift of
// the whole vector brings one pair of columns of all 16 rows to the bottom of the halves. With 3 bits a half
// holds five codes and one spare bit; the spare bits of the three words are the code of the 16th pair.
//
// The order of additions of one output element never depends on the number of tokens: four interleaved sums
// within BLOCK_UNITS units, then the blocks of a group, then the groups.

constexpr long BLOCK_ROWS = 16, UNIT = 32, BLOCK_UNITS = 4;
constexpr int SUMS = 4;                       // independent chains: one would wait for its own last addition
constexpr long AHEAD = 512;                   // words: memory this far on is asked for now
constexpr int TOKENS = LANES == 16 ? 4 : 2;   // whose sums fit into the registers beside the codes

typedef int8_t VB __attribute__((vector_size(LANES)));
typedef int8_t VBMem __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint32_t VUMem __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE VU load_words(const uint32_t* p) { return *reinterpret_cast<const VUMem*>(p); }
INLINE V load_signed(const int8_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const VBMem*>(p), V);
}

// One spare bit of each half of three words.
INLINE VU spare_code(VU a, VU b, VU c) {
  return ((a >> 15) & 0x00010001u) | ((b >> 14) & 0x00020002u) | ((c >> 13) & 0x00040004u);
}

// What a code stands for: two's complement, or one bit for ±1.
template <int BITS>
constexpr int level(int code) {
  if (BITS == 1) return code & 1 ? 1 : -1;
  code &= (1 << BITS) - 1;
  return code >> (BITS - 1) ? code - (1 << BITS) : code;
}

// Codes as floats, column by column: multiply(column, V of LANES rows).
template <int BITS>
struct Floats {
  static constexpr int kPer = 1;
#if LANES == 16
  V table;
  INLINE Floats() {
    if constexpr (BITS <= 4) {
      for (int i = 0; i < 16; ++i) table[i] = static_cast<float>(level<BITS>(i));
    }
  }
#endif

  INLINE V value(VU word, int shift) const {
#if LANES == 16
    // Only the lower four bits of an index count, and the table repeats. Unmasked, gcc 12 warns of a register
    // it leaves unset on purpose; with a mask of ones the instruction is the same.
    if constexpr (BITS <= 4) {
      return (V)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(word >> shift), (__m512)table);
    }
#endif
    if constexpr (BITS == 1) {
      return (V)(((word << (31 - shift)) & 0x80000000u) ^ 0xbf800000u);  // the sign of 1
    } else {
      return __builtin_convertvector((VI)(word << (32 - BITS - shift)) >> (32 - BITS), V);
    }
  }

  template <class Multiply>
  INLINE void decode(const uint32_t* words, const Multiply& multiply) const {
    constexpr int codes = 16 / BITS;  // per half word
#pragma GCC unroll 8
    for (int w = 0; w < BITS; ++w) {
      const VU word = load_words(words + w * BLOCK_ROWS);
      __builtin_prefetch(words + w * BLOCK_ROWS + AHEAD, 0, 2);
#pragma GCC unroll 16
      for (int i = 0; i < codes; ++i) {
        multiply(2 * (w * codes + i), value(word, BITS * i));
        multiply(2 * (w * codes + i) + 1, value(word, BITS * i + 16));
      }
    }
    if constexpr (BITS == 3) {
      const VU spare = spare_code(load_words(words), load_words(words + BLOCK_ROWS),
                                  load_words(words + 2 * BLOCK_ROWS));
      multiply(30, value(spare, 0));
      multiply(31, value(spare, 16));
    }
  }
};

#if BF16_DOT
// Codes as pairs of bfloat16, which hold small whole numbers exactly: multiply(pair of columns, V).
template <int BITS>
struct Pairs {
  static constexpr int kPer = 2;
  typedef uint16_t Halves __attribute__((vector_size(64)));
  __m512i table, upper;  // upper: of the upper four of eight bits

  INLINE Pairs() {
    alignas(64) bf16 low[32], high[32];
    for (int i = 0; i < 32; ++i) {
      // A table of 32 takes five bits of the index: the fifth must not matter.
      const float a = static_cast<float>(BITS == 8 ? i & 15 : level<BITS>(i)), b = 16.0f * level<4>(i);
      uint32_t bits;
      __builtin_memcpy(&bits, &a, 4);
      low[i] = static_cast<bf16>(bits >> 16);
      __builtin_memcpy(&bits, &b, 4);
      high[i] = static_cast<bf16>(bits >> 16);
    }
    table = _mm512_load_si512(low), upper = _mm512_load_si512(high);
  }

  static INLINE V look_up(__m512i table, VU word, int shift) {
    return (V)_mm512_maskz_permutexvar_epi16(0xffffffff, (__m512i)((Halves)word >> shift), table);
  }

  template <class Multiply>
  INLINE void decode(const uint32_t* words, const Multiply& multiply) const {
    constexpr int codes = 16 / BITS;
#pragma GCC unroll 8
    for (int w = 0; w < BITS; ++w) {
      const VU word = load_words(words + w * BLOCK_ROWS);
      __builtin_prefetch(words + w * BLOCK_ROWS + AHEAD, 0, 2);
#pragma GCC unroll 16
      for (int i = 0; i < codes; ++i) {
        multiply(w * codes + i, look_up(table, word, BITS * i));
        if constexpr (BITS == 8) multiply(w * codes + i, look_up(upper, word, BITS * i + 4));
      }
    }
    if constexpr (BITS == 3) {
      const VU spare = spare_code(load_words(words), load_words(words + BLOCK_ROWS),
                                  load_words(words + 2 * BLOCK_ROWS));
      multiply(15, look_up(table, spare, 0));
    }
  }
};
#endif

template <class T, int BITS>
struct DecoderOf {
  using type = Floats<BITS>;
};
#if BF16_DOT
template <int BITS>
struct DecoderOf<bf16, BITS> {
  using type = Pairs<BITS>;
};
#endif

// M rows of tokens, k elements each: units [ceil(k / 32) · 32 / kPer][M], zeros past k; then the sums of their
// elements over each group of columns [groups][M], which a zero point multiplies.
struct Tokens {
  const float* units;
  const float* sums;
};

// Rows block·16 … of `w`, k columns, times M tokens: c [M][16].
template <class T, int BITS, int M>
void block_product(const CoterieCodes& w, long block, const Tokens& a, long k, float* c) {
  using Decoder = typename DecoderOf<T, BITS>::type;
  constexpr int PER = Decoder::kPer;
  const Decoder decoder;
  const long count = ceil_div(k, UNIT), per_group = w.group / UNIT, groups = ceil_div(count, per_group);
  const auto* codes = w.codes + block * count * BITS * BLOCK_ROWS;
  for (int lane = 0; lane < BLOCK_ROWS; lane += LANES) {
    V total[M] = {};
    for (long g = 0; g < groups; ++g) {
      const long last = min(count, (g + 1) * per_group), at = (block * groups + g) * BLOCK_ROWS + lane;
      V whole[M] = {};
      for (long u = g * per_group; u < last; u += BLOCK_UNITS) {
        V sum[M][SUMS] = {};
        for (long i = u; i < min(last, u + BLOCK_UNITS); ++i) {
          const float* x = a.units + i * (UNIT / PER) * M;
          decoder.decode(codes + i * BITS * BLOCK_ROWS + lane, [&](int j, V value) INLINE_LAMBDA {
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) sum[m][j % SUMS] = multiply_add<PER>(x[j * M + m], value, sum[m][j % SUMS]);
          });
        }
        for (int m = 0; m < M; ++m) whole[m] += (sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3]);
      }
      if (w.zeros) {
        const V zero = load_signed(w.zeros + at);
        for (int m = 0; m < M; ++m) whole[m] -= zero * a.sums[g * M + m];
      }
      const V scale = load(w.scales + at);
      for (int m = 0; m < M; ++m) total[m] += scale * whole[m];
    }
    for (int m = 0; m < M; ++m) store(c + m * BLOCK_ROWS + lane, total[m]);
  }
}

template <class T, int BITS, int M = TOKENS>
INLINE void rows_product(int m, const CoterieCodes& w, long block, const Tokens& a, long k, float* c) {
  if constexpr (M > 1) {
    if (m < M) return rows_product<T, BITS, M - 1>(m, w, block, a, k, c);
  }
  block_product<T, BITS, M>(w, block, a, k, c);
}

template <class T>
void product(int m, const CoterieCodes& w, long block, const Tokens& a, long k, float* c) {
  switch (w.bits) {
    case 1: return rows_product<T, 1>(m, w, block, a, k, c);
    case 2: return rows_product<T, 2>(m, w, block, a, k, c);
    case 3: return rows_product<T, 3>(m, w, block, a, k, c);
    case 4: return rows_product<T, 4>(m, w, block, a, k, c);
    default: return rows_product<T, 8>(m, w, block, a, k, c);
  }
}
