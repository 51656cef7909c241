// Forward: gather → gate/up → activation·mul into packed hidden rows; then down → weighted sum per token.
// The second step is split by output columns, so that a token's sum over its experts is made by one thread,
// in expert order, and no table of every slot's output is needed.

// What both directions need to know about the routing.
struct Plan {
  Chunk* chunks = nullptr;
  long count = 0, used = 0;
  int32_t* tokens = nullptr;  // [used] token of each sorted row
  float* weights = nullptr;   // [used] its combine weight
  bool ok = false;

  explicit Plan(const CoterieMlp& p) {
    used = p.experts ? p.ends[p.experts - 1] : 0;
    const size_t most = static_cast<size_t>(p.experts + used / CHUNK + 1);
    chunks = static_cast<Chunk*>(allocate(most * sizeof(Chunk)));
    tokens = static_cast<int32_t*>(allocate(used * sizeof(int32_t)));
    weights = static_cast<float*>(allocate(used * sizeof(float)));
    ok = chunks && tokens && weights;
    if (!ok) return;
    for (long r = 0; r < used; ++r) {
      tokens[r] = static_cast<int32_t>(p.order[r] / p.slots);
      weights[r] = p.weights[p.order[r]];
    }
    for (long e = 0, start = 0; e < p.experts; start = p.ends[e++]) {
      const long rows = p.ends[e] - start, parts = ceil_div(rows, CHUNK);
      for (long i = 0; i < parts; ++i) {
        const long first = start + rows * i / parts;
        chunks[count++] = {e, first, start + rows * (i + 1) / parts - first};
      }
    }
  }
  ~Plan() { release(chunks), release(tokens), release(weights); }
};

// Floats of a matrix [rows, cols] in panels of its rows.
template <class T>
INLINE long matrix_floats(long rows, long cols) {
  return ceil_div(rows, WIDTH) * WIDTH * units<T>(cols);
}

// A range of panels: part `i` of `parts`.
struct Range {
  long begin, end;
  Range(long panels, long parts, long i) : begin(panels * i / parts), end(panels * (i + 1) / parts) {}
};

// Columns j·WIDTH … of a bank's product with rows: y = x·wᵀ takes forward, y = x·w takes backward. Each expert has
// `matrices` of this size, one after the other, or row by row in turn.
template <class T>
INLINE Panel<T> forward_panel(const CoterieBank& w, long expert, long matrix, long matrices, bool interleaved,
                              long rows, long cols, long j) {
  const long step = interleaved ? matrices : 1, first = interleaved ? matrix : matrix * rows;
  Panel<T> panel{static_cast<const T*>(w.data) + expert * w.expert + (first + j * WIDTH * step) * w.row, w.row * step,
                 w.col, min(WIDTH, rows - j * WIDTH)};
  if (panel.col != 1 && step == 2) panel.data -= matrix * w.row, panel.turn = matrix;
  if (w.prepacked) {
    const long size = matrix_floats<T>(rows, cols);
    panel.prepacked = w.prepacked + (expert * matrices + matrix) * size + j * WIDTH * units<T>(cols);
  }
  return panel;
}

// Every matrix of a bank in panels, so that forward need not pack them. Experts have `matrices` each.
template <class T>
void prepack(const CoterieBank& bank, long experts, long matrices, bool interleaved, long rows, long cols, int threads,
             float* out) {
  const long panels = ceil_div(rows, WIDTH);
  auto task = [&](long t) {
    const long matrix = t / panels, j = t % panels;
    const Panel<T> panel = forward_panel<T>(bank, matrix / matrices, matrix % matrices, matrices, interleaved, rows, cols, j);
    pack_panel(panel, 0, cols, out + t * WIDTH * units<T>(cols), nullptr);
  };
  parallel(experts * matrices * panels, threads, task);
}

template <class T>
INLINE Panel<T> backward_panel(const CoterieBank& w, long expert, long cols, long j) {
  const T* data = static_cast<const T*>(w.data) + expert * w.expert + j * WIDTH * w.col;
  return {data, w.col, w.row, min(WIDTH, cols - j * WIDTH)};
}

// Packs a chunk's rows into the thread's scratch, unless its last task in this phase did already.
template <class T>
const float* packed_chunk(const Rows<T>& rows, const Chunk& chunk, long k, unsigned long phase) {
  static thread_local unsigned long last_phase;
  static thread_local long last_first;
  auto* a = static_cast<float*>(scratch(0, (chunk.rows * units<T>(k) + LANES) * sizeof(float)));
  if (!a || (last_phase == phase && last_first == chunk.first)) return a;
  const Timed timed(kRowsPacked);
  for (long t = 0; t < chunk.tiles(); ++t) {
    const long first = chunk.tile(t), m = chunk.tile(t + 1) - first;
    pack_tile(rows, chunk.first + first, static_cast<int>(m), k, a + first * units<T>(k));
  }
  last_phase = phase, last_first = chunk.first;
  return a;
}

// How many parts to cut each chunk's columns into, so that every thread finds work to the end.
INLINE long parts_per_chunk(long chunks, int threads, long panels) {
  if (threads <= 1 || chunks == 0) return 1;
  return min(panels, ceil_div(16l * threads, chunks));
}
INLINE long column_parts(int threads, long panels) { return threads <= 1 ? 1 : min(panels, 4l * threads); }

// The table of sums per token, [tokens, columns], to which tiles add scattered rows.
struct Sums {
  float* data;
  long columns;

  void clear(long tokens, const Range& range) const {
    const long first = range.begin * WIDTH, some = min(columns, range.end * WIDTH) - first;
    for (long t = 0; t < tokens; ++t) __builtin_memset(data + t * columns + first, 0, some * sizeof(float));
  }

  // Brings near what a tile will add to.
  INLINE void expect(const int32_t* rows, int m, long j) const {
    for (int i = 0; i < m; ++i) {
      const float* row = data + rows[i] * columns + j * WIDTH;
      for (int at = 0; at < WIDTH; at += 16) __builtin_prefetch(row + at, 0, 2);
    }
  }

  INLINE void add(const int32_t* rows, int m, long j, const float* c, long ldc) const {
    for (int begin = 0, end = 1; begin < m; begin = end++) {
      while (end < m && rows[end] != rows[end - 1]) ++end;  // a token with an expert twice has both, one after the other
      add_different(rows + begin, end - begin, j, c + begin * ldc, ldc);
    }
  }

  // All loads before all stores: rows lie a multiple of 4096 bytes apart as often as not, and a load behind a
  // store to such an address waits for it.
  INLINE void add_different(const int32_t* rows, int m, long j, const float* c, long ldc) const {
    float total[ROWS][WIDTH];
    for (int i = 0; i < m; ++i) {
      const float* row = data + rows[i] * columns + j * WIDTH;
      for (int g = 0; g < WIDTH; g += LANES) {
        store(&total[i][g], load_some(row + g, columns - j * WIDTH - g) + load(c + i * ldc + g));
      }
    }
    for (int i = 0; i < m; ++i) {
      float* row = data + rows[i] * columns + j * WIDTH;
      for (int g = 0; g < WIDTH; g += LANES) {
        store_some(row + g, load(&total[i][g]), columns - j * WIDTH - g);
      }
    }
  }

  // The finished columns in the output's type; nothing to do where that is the table itself.
  template <class T>
  void round(long tokens, const Range& range, T* out) const {
    if (sizeof(T) == sizeof(float)) return;
    const long first = range.begin * WIDTH, some = min(columns, range.end * WIDTH) - first;
    for (long t = 0; t < tokens; ++t) {
      const long at = t * columns + first;
      for (long i = 0; i < some; i += LANES) store_some(out + at + i, load_some(data + at + i, some - i), some - i);
    }
  }
};

template <int A>
INLINE V gated_value(const CoterieMlp& p, V gate, V up) {
  if (A == kClampedSwiglu) return ClampedSwiglu{p.limit, p.alpha, p.shift}(gate, up);
  return activate<A>(gate) * up;
}

template <class T>
struct Forward {
  const CoterieMlp& p;
  const Plan& plan;
  // Hidden values are rounded to bfloat16 only where the next product takes them so.
  using Hidden = typename Choose<kPer<T> == 2, bf16, float>::type;
  float* hidden;  // packed tiles, F each row
  Sums table;     // [T, O]
  const unsigned long phase = next_call();
  volatile bool failed = false;

  template <int A>
  void finish_hidden(const Chunk& chunk, long j, long first, int m, const float* c, long ldc) {
    Hidden out[ROWS][WIDTH];
    const long wide = p.gated ? 2 * p.hidden : p.hidden, left = p.hidden - j * WIDTH;
    const T* bias = p.b_in ? static_cast<const T*>(p.b_in) + chunk.expert * wide + j * WIDTH : nullptr;
    for (int i = 0; i < m; ++i) {
      T* pre = p.pre ? static_cast<T*>(p.pre) + (chunk.first + first + i) * wide + j * WIDTH : nullptr;
      for (int g = 0; g < WIDTH; g += LANES) {
        V gate = load(c + i * ldc + g);
        if (bias) gate += load_some(bias + g, left - g);
        if (pre) store_some(pre + g, gate, left - g);
        if (!p.gated) {
          store(&out[i][g], activate<A>(gate));
          continue;
        }
        V up = load(c + i * ldc + WIDTH + g);
        if (bias) up += load_some(bias + p.hidden + g, left - g);
        if (pre) store_some(pre + p.hidden + g, up, left - g);
        store(&out[i][g], gated_value<A>(p, gate, up));
      }
    }
    float* tile = hidden + (chunk.first + first) * units<T>(p.hidden) + j * (WIDTH / kPer<T>) * m;
    pack_tile(Rows<Hidden>{out[0], WIDTH, nullptr}, 0, m, min(WIDTH, left), tile);
  }

  void finish(const Chunk& chunk, long j, long first, int m, const float* c, long ldc) {
    switch (p.activation) {
      case kSilu: return finish_hidden<kSilu>(chunk, j, first, m, c, ldc);
      case kGelu: return finish_hidden<kGelu>(chunk, j, first, m, c, ldc);
      case kGeluTanh: return finish_hidden<kGeluTanh>(chunk, j, first, m, c, ldc);
      case kRelu: return finish_hidden<kRelu>(chunk, j, first, m, c, ldc);
      case kRelu2: return finish_hidden<kRelu2>(chunk, j, first, m, c, ldc);
      case kClampedSwiglu: return finish_hidden<kClampedSwiglu>(chunk, j, first, m, c, ldc);
      default: return finish_hidden<kSigmoid>(chunk, j, first, m, c, ldc);
    }
  }

  void in_panels(Panel<T>* panels, long expert, long j) const {
    for (int i = 0; i <= p.gated; ++i) panels[i] = forward_panel<T>(p.w_in, expert, i, 1 + p.gated, p.interleaved, p.hidden, p.dim, j);
  }

  void up(long c, const Range& range) {
    const Chunk& chunk = plan.chunks[c];
    const Rows<T> x{static_cast<const T*>(p.x), p.x_row, plan.tokens};
    const float* a = packed_chunk(x, chunk, p.dim, phase);
    auto* packed = static_cast<float*>(scratch(1, kPanelFloats * sizeof(float)));
    auto* sums = static_cast<float*>(scratch(2, kSumFloats * sizeof(float)));
    if (!a || !packed || !sums) return void(failed = true);
    for (long j = range.begin; j < range.end; ++j) {
      Multiply<T> job{a, chunk, p.dim, {}, p.gated ? 2 : 1, {}};
      in_panels(job.panels, chunk.expert, j);
      Panel<T> next[2];
      const bool more = j + 1 < range.end;
      if (more || c + 1 < plan.count) {
        in_panels(next, more ? chunk.expert : plan.chunks[c + 1].expert, more ? j + 1 : 0);
        for (int i = 0; i < job.count; ++i) prefetch_panel(job.ahead, next[i], p.dim);
      }
      multiply(job, packed, sums, [](long, int) {}, [&](long first, int m, const float* out, long ldc) {
        finish(chunk, j, first, m, out, ldc);
      });
    }
  }

  Panel<T> out_panel(long expert, long j) const {
    return forward_panel<T>(p.w_out, expert, 0, 1, false, p.out, p.hidden, j);
  }

  void down(const Range& range) {
    auto* packed = static_cast<float*>(scratch(1, kPanelFloats * sizeof(float)));
    auto* sums = static_cast<float*>(scratch(2, kSumFloats * sizeof(float)));
    if (!packed || !sums) return void(failed = true);
    table.clear(p.tokens, range);
    for (long c = 0; c < plan.count; ++c) {
      const Chunk& chunk = plan.chunks[c];
      const T* bias = p.b_out ? static_cast<const T*>(p.b_out) + chunk.expert * p.out : nullptr;
      for (long j = range.begin; j < range.end; ++j) {
        Multiply<T> job{hidden + chunk.first * units<T>(p.hidden), chunk, p.hidden, {out_panel(chunk.expert, j)}, 1, {}};
        const bool more = j + 1 < range.end;
        if (more || c + 1 < plan.count) {
          const long expert = more ? chunk.expert : plan.chunks[c + 1].expert;
          prefetch_panel(job.ahead, out_panel(expert, more ? j + 1 : range.begin), p.hidden);
        }
        const int32_t* rows = plan.tokens + chunk.first;
        const auto expect = [&](long first, int m) { table.expect(rows + first, m, j); };
        multiply(job, packed, sums, expect, [&](long first, int m, float* out, long ldc) {
          for (int i = 0; i < m; ++i) {
            const float weight = plan.weights[chunk.first + first + i];
            for (int g = 0; g < WIDTH; g += LANES) {
              V value = load(out + i * ldc + g);
              if (bias) value += load_some(bias + j * WIDTH + g, p.out - j * WIDTH - g);
              store(out + i * ldc + g, weight * value);
            }
          }
          table.add(rows + first, m, j, out, ldc);
        });
      }
    }
    table.round(p.tokens, range, static_cast<T*>(p.y));
  }
};

template <class T>
int forward(const CoterieMlp& p) {
  const Plan plan(p);
  auto* hidden = static_cast<float*>(allocate(plan.used * units<T>(p.hidden) * sizeof(float)));
  const bool direct = sizeof(T) == sizeof(float);
  auto* sums32 = static_cast<float*>(direct ? p.y : allocate(p.tokens * p.out * sizeof(float)));
  bool ok = plan.ok && hidden && sums32;
  if (ok) {
    Forward<T> run{p, plan, hidden, {sums32, p.out}};
    const long in_count = ceil_div(p.hidden, WIDTH), out_count = ceil_div(p.out, WIDTH);
    const long parts = parts_per_chunk(plan.count, p.threads, in_count);
    auto up = [&](long task) { run.up(task / parts, Range(in_count, parts, task % parts)); };
    parallel(plan.count * parts, p.threads, up);
    const long columns = column_parts(p.threads, out_count);
    auto down = [&](long task) { run.down(Range(out_count, columns, task)); };
    if (!run.failed) parallel(columns, p.threads, down);
    ok = !run.failed;
  }
  release(hidden);
  if (!direct) release(sums32);
  return ok ? 0 : 1;
}
