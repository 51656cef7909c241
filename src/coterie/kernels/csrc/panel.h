// One chunk of packed rows times one or two panels of a weight matrix.

// Rows of one expert that are computed together: sorted rows first … first + rows - 1.
struct Chunk {
  long expert, first, rows;
  INLINE long tiles() const { return ceil_div(rows, ROWS); }
  INLINE long tile(long i) const { return rows * i / tiles(); }  // first row of tile i, from 0
};

constexpr long CHUNK = 256;            // rows: a chunk's packed tokens stay in the second-level cache
constexpr long NEAR = 32;              // units ahead that a panel is fetched while it streams through one tile
constexpr long BLOCK = 4 * DEPTH;      // units of k packed at a time: two panels fit beside them

template <class T>
struct Multiply {
  const float* a;        // the chunk's packed tiles
  Chunk chunk;
  long k;                // elements
  Panel<T> panels[2];
  int count;             // 1 or 2 panels, their results side by side
  Prefetch ahead;        // what is needed after this
};

template <class T>
void prefetch_panel(Prefetch& ahead, const Panel<T>& panel, long k) {
  constexpr long line = 64;
  if (panel.prepacked) return ahead.add(panel.prepacked, line, WIDTH * units<T>(k) * long{sizeof(float)} / line);
  if (panel.col == 1) {
    if (panel.row == k) ahead.add(panel.data, line, ceil_div(panel.valid * k * long{sizeof(T)}, line));
    return;
  }
  const long width = min(WIDTH, panel.valid) * (panel.turn < 0 ? 1 : 2) * long{sizeof(T)};
  for (long at = 0; at < width; at += line) {
    ahead.add(reinterpret_cast<const char*>(panel.data) + at, panel.col * long{sizeof(T)}, k);
  }
}

// Floats of scratch that multiply needs for packed panels, and for sums.
constexpr size_t kPanelFloats = size_t{2} * BLOCK * WIDTH;
constexpr size_t kSumFloats = size_t{2} * CHUNK * WIDTH;

// Calls begin(first row of the tile, m) before the last sums of a tile, for what finish will touch, and
// finish(first, m, sums, ldc) with the finished sums.
template <class T, class Begin, class Finish>
void multiply(Multiply<T>& job, float* packed, float* sums, Begin begin, Finish finish) {
  constexpr int PER = kPer<T>;
  const long count = units<T>(job.k), tiles = job.chunk.tiles(), ldc = job.count * WIDTH;
  const bool packed_before = job.panels[0].prepacked;
  if (job.chunk.rows <= FEW && job.panels[0].col == 1 && !packed_before) {
    const int m = static_cast<int>(job.chunk.rows);
    begin(0, m);
    {
      const Timed timed(kProducts);
      for (int p = 0; p < job.count; ++p) {
        const Panel<T>& panel = job.panels[p];
        for (int g = 0; g < 2; ++g) {
          stream_rows<T>(m, job.a, panel.data + g * LANES * panel.row, panel.row, panel.valid - g * LANES, job.k,
                         sums + p * WIDTH + g * LANES, ldc, job.ahead);
        }
      }
    }
    const Timed timed(kFinished);
    finish(0, m, sums, ldc);
    return;
  }
  for (long block = 0; block < count; block += BLOCK) {
    const long last = min(count, block + BLOCK);
    const float* b[2];
    for (int p = 0; p < job.count; ++p) {
      b[p] = packed + p * BLOCK * WIDTH;
      if (packed_before) {
        b[p] = job.panels[p].prepacked + block * WIDTH;
        continue;
      }
      const Timed timed(kWeightsPacked);
      pack_panel(job.panels[p], block * PER, min(job.k, last * PER) - block * PER, packed + p * BLOCK * WIDTH,
                 tiles == 1 ? &job.ahead : nullptr);
    }
    for (long t = 0; t < tiles; ++t) {
      const long first = job.chunk.tile(t);
      const int m = static_cast<int>(job.chunk.tile(t + 1) - first);
      const Tile run = tile_for<PER>(m);
      if (last == count) begin(first, m);
      float* c = sums + (count > BLOCK ? first * ldc : 0);
      {
        const Timed timed(kProducts);
        for (long u = block; u < last; u += DEPTH) {
          const long depth = min(DEPTH, last - u);
          const float* a = job.a + first * count + u * m;
          for (int p = 0; p < job.count; ++p) {
            const float* panel = b[p] + (u - block) * WIDTH;
            long step = WIDTH * sizeof(float), pair = step / 2;
            const char* line = reinterpret_cast<const char*>(panel + NEAR * WIDTH);
            if (!packed_before || tiles > 1) line = job.ahead.take(depth, a, &step), pair = 0;
            run(a, panel, depth, c + p * WIDTH, ldc, u > 0, line, step, pair);
          }
        }
      }
      if (last == count) {
        const Timed timed(kFinished);
        finish(first, m, c, ldc);
      }
    }
  }
}
