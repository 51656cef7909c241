// Operands rearranged for the register tiles of tile.h, in 32-bit units along the summed index k.
//
// A unit is one float, or on a processor with bfloat16 dot products a pair of bfloat16 (k, k + 1).
// Panels of the right operand hold WIDTH columns: [k][WIDTH]; tiles of the left one m ≤ ROWS rows: [k][m].

template <class T>
constexpr int kPer = sizeof(T) == 2 && BF16_DOT ? 2 : 1;  // elements per unit

constexpr int WIDTH = 2 * LANES;

template <class T>
INLINE long units(long elements) {
  return ceil_div(elements, kPer<T>);
}

// LANES units from p on, `left` elements before the row ends; zeros after them.
template <class T>
INLINE V load_units(const T* p, long left) {
  if (kPer<T> == 1) return load_some(p, left);
  if (left >= 2 * LANES) return *reinterpret_cast<const VMem*>(p);
  V v = {};
  if (left > 0) __builtin_memcpy(&v, p, left * sizeof(T));
  return v;
}

// LANES units at column p of rows 2k and 2k + 1 (or of row k alone), `left` columns before the row ends.
// `below` is null where there is no second row.
template <class T>
INLINE V load_column_units(const T* p, const T* below, long left) {
  if constexpr (kPer<T> == 1) {
    return load_some(p, left);
  } else {
    bf16 part[2][LANES] = {};
    const bf16 *first = p, *second = below;
    if (left < LANES) {
      if (left <= 0) return V{};
      __builtin_memcpy(part[0], p, left * sizeof(bf16));
      if (below) __builtin_memcpy(part[1], below, left * sizeof(bf16));
      first = part[0];
    }
    if (left < LANES || !below) second = part[1];
    const VU low = __builtin_convertvector(*reinterpret_cast<const VHMem*>(first), VU);
    const VU high = __builtin_convertvector(*reinterpret_cast<const VHMem*>(second), VU);
    return (V)(low | (high << 16));
  }
}

// The same of every second column from p[turn] on.
template <class T>
INLINE V load_turn_units(const T* p, const T* below, long turn, long left) {
  T part[2][2 * LANES] = {};
  if (left < LANES) {
    if (left <= 0) return V{};
    __builtin_memcpy(part[0], p, 2 * left * sizeof(T));
    if (below) __builtin_memcpy(part[1], below, 2 * left * sizeof(T));
    p = part[0], below = part[1];
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    return turn ? odd_lanes(load(p), load(p + LANES)) : even_lanes(load(p), load(p + LANES));
  } else {
    const VU first = *reinterpret_cast<const VUMem*>(p);
    if (kPer<T> == 1) return (V)(turn ? first & 0xffff0000u : first << 16);
    const VU second = *reinterpret_cast<const VUMem*>(below ? below : part[1]);
    return (V)(turn ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16);
  }
}

// Lines of memory to bring near while computing: up to four strided runs, walked a few lines at a time.
struct Prefetch {
  struct Run {
    const char* base;
    long step, lines;
  };
  Run runs[4];
  int count = 0;
  long position = 0;

  void add(const void* base, long step, long lines) {
    if (lines > 0 && count < 4) runs[count++] = {static_cast<const char*>(base), step, lines};
  }
  // Start of the next `lines` lines, *step bytes apart; `idle` and 0 when all were handed out.
  INLINE const char* take(long lines, const void* idle, long* step) {
    if (count == 0) {
      *step = 0;
      return static_cast<const char*>(idle);
    }
    const Run& run = runs[0];
    const char* p = run.base + position * run.step;
    *step = run.step;
    position += lines;
    if (position >= run.lines) {
      position = 0;
      --count;
      for (int i = 0; i < count; ++i) runs[i] = runs[i + 1];
    }
    return p;
  }
};

// WIDTH columns of the right operand: element (k, n) at data[n·row + k·col], `valid` of them real.
// Where they were packed before, `prepacked` points to them: [units(k)][WIDTH].
template <class T>
struct Panel {
  const T* data;
  long row, col, valid;
  const float* prepacked = nullptr;
  long turn = -1;  // 0 or 1: every second column at `data` is meant, from this one on
};

// k elements of LANES rows at `rows` as [k][WIDTH] at dst.
template <class T>
INLINE void pack_group(const T* rows, long row, long valid, long k, float* dst, Prefetch* ahead) {
  const long count = units<T>(k);
  for (long u = 0; u < count; u += LANES) {
    V v[LANES];
    const long left = k - u * kPer<T>;
    if (left >= LANES * kPer<T> && valid >= LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) v[i] = load_units(rows + i * row + u * kPer<T>, LANES * kPer<T>);
    } else {
      for (int i = 0; i < LANES; ++i) v[i] = i < valid ? load_units(rows + i * row + u * kPer<T>, left) : V{};
    }
    if (ahead) {
      long step;
      const char* line = ahead->take(LANES / 2, dst, &step);
      for (int i = 0; i < LANES / 2; ++i) __builtin_prefetch(line + i * step, 0, 2);
    }
    transpose(v);
    const long some = min(LANES, count - u);
    if (some == LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(dst + (u + i) * WIDTH, v[i]);
    } else {
      for (int i = 0; i < some; ++i) store(dst + (u + i) * WIDTH, v[i]);
    }
  }
}

// k elements of a panel, from element k0 on, as [units(k)][WIDTH].
template <class T>
void pack_panel(const Panel<T>& panel, long k0, long k, float* dst, Prefetch* ahead) {
  if (panel.col == 1) {
    for (int g = 0; g < 2; ++g) {
      pack_group(panel.data + g * LANES * panel.row + k0, panel.row, panel.valid - g * LANES, k,
                 dst + g * LANES, ahead);
    }
    return;
  }
  for (long u = 0; u < units<T>(k); ++u) {
    const long at = k0 + u * kPer<T>;
    const T* p = panel.data + at * panel.col;
    const T* below = u * kPer<T> + 1 < k ? p + panel.col : nullptr;
    for (int g = 0; g < 2; ++g) {
      const long at = g * LANES, left = panel.valid - at;
      store(dst + u * WIDTH + at,
            panel.turn < 0 ? load_column_units(p + at, below ? below + at : below, left)
                           : load_turn_units(p + 2 * at, below ? below + 2 * at : below, panel.turn, left));
    }
  }
}

// Writes m floats at dst; may write LANES when that stays before `end`. Calls go upwards in memory.
INLINE void store_overlapping(float* dst, V v, int m, const float* end) {
  if (dst + LANES <= end) store(dst, v);
  else store_part(dst, v, m);
}

// Rows to gather: row i starts at data + index[i]·stride, or data + i·stride without an index.
template <class T>
struct Rows {
  const T* data;
  long stride;
  const int32_t* index;
  INLINE const T* operator[](long i) const { return data + (index ? index[i] : i) * stride; }
};

// Rows first … first + m - 1, k elements each, as [units(k)][m].
template <class T>
void pack_tile(const Rows<T>& rows, long first, int m, long k, float* dst) {
  const long count = units<T>(k);
  const float* end = dst + count * m;
  const T* row[LANES];
  for (int i = 0; i < m; ++i) row[i] = rows[first + i];
  for (long u = 0; u < count; u += LANES) {
    V v[LANES];
    for (int i = 0; i < LANES; ++i) {
      v[i] = i < m ? load_units(row[i] + u * kPer<T>, k - u * kPer<T>) : V{};
    }
    transpose(v);
    const long some = min(LANES, count - u);
    for (int i = 0; i < some; ++i) store_overlapping(dst + (u + i) * m, v[i], m, end);
  }
}

// The transposed product's left operand: columns c0 … c0 + m - 1 of `count` rows, as [units(count)][m].
template <class T>
void pack_tile_columns(const Rows<T>& rows, long first, long count, long c0, int m, float* dst) {
  const long n = units<T>(count);
  const float* end = dst + n * m;
  for (long u = 0; u < n; ++u) {
    const long r = u * kPer<T>;
    const T* below = r + 1 < count ? rows[first + r + 1] + c0 : nullptr;
    store_overlapping(dst + u * m, load_column_units(rows[first + r] + c0, below, m), m, end);
  }
}

// Its right operand: columns c0 … c0 + valid - 1 of `count` rows, as [units(count)][WIDTH].
template <class T>
void pack_panel_columns(const Rows<T>& rows, long first, long count, long c0, long valid, float* dst) {
  for (long u = 0; u < units<T>(count); ++u) {
    const long r = u * kPer<T>;
    const T* p = rows[first + r] + c0;
    const T* below = r + 1 < count ? rows[first + r + 1] + c0 : nullptr;
    for (int g = 0; g < 2; ++g) {
      store(dst + u * WIDTH + g * LANES,
            load_column_units(p + g * LANES, below ? below + g * LANES : below, valid - g * LANES));
    }
  }
}
