// Forward with packed low-bit experts, in the two steps of forward.h: gather → gate/up → activation·mul into
// hidden rows; then down → weighted sum per token. A block of 16 packed rows is read from memory once, for all
// of an expert's tokens.

template <class T>
struct LowBit {
  const CoterieMlp& p;
  const CoterieCodes* codes;  // [E][3]: gate (or the only one), up, down
  const Plan& plan;
  using Hidden = typename Choose<kPer<T> == 2, bf16, float>::type;
  Hidden* hidden;  // [N, F] in expert order, multiplied by down's input scale
  float* table;    // [T, O]
  const unsigned long phase = next_call();
  volatile bool failed = false;

  static long padded(long k) { return ceil_div(k, UNIT) * UNIT / kPer<T>; }

  // A chunk's tokens as `product` takes them, tile after tile, in the thread's scratch.
  struct Packed {
    float* data;
    long k, groups;
    long tile_floats() const { return padded(k) + groups; }  // per token
    Tokens tile(long first, long m) const {
      const float* at = data + first * tile_floats();
      return {at, at + m * padded(k)};
    }
  };

  template <class Row>
  static Packed pack(const Chunk& chunk, long k, long group, const float* input_scale, Row row) {
    const long groups = ceil_div(ceil_div(k, UNIT) * UNIT, group), full = padded(k) * kPer<T>;
    Packed packed{nullptr, k, groups};
    packed.data = static_cast<float*>(scratch(0, (chunk.rows * packed.tile_floats() + LANES) * sizeof(float)));
    auto* line = static_cast<Hidden*>(scratch(1, (full + LANES) * sizeof(Hidden)));
    if (!packed.data || !line) return {nullptr, k, groups};
    for (long r = 0; r < chunk.rows; ++r) {
      const long first = r / TOKENS * TOKENS, m = min(TOKENS, chunk.rows - first);
      const auto* from = row(chunk.first + r);
      for (long i = 0; i < full; i += LANES) {
        V v = load_some(from + i, k - i);
        if (input_scale) v *= load_some(input_scale + i, k - i);
        store(line + i, v);
      }
      float* units = packed.data + first * packed.tile_floats() + (r - first);
      for (long u = 0; u < padded(k); ++u) __builtin_memcpy(units + u * m, line + u * kPer<T>, sizeof(float));
      float* sums = units + padded(k) * m;
      for (long g = 0; g < groups; ++g) {
        V sum = {};
        for (long i = g * group; i < min(full, (g + 1) * group); i += LANES) sum += load(line + i);
        sums[g * m] = sum_lanes(sum);
      }
    }
    return packed;
  }

  void finish(const Chunk& chunk, long j, long first, long m, const float* gate_c, const float* up_c) const {
    const long wide = p.gated ? 2 * p.hidden : p.hidden;
    const T* bias = p.b_in ? static_cast<const T*>(p.b_in) + chunk.expert * wide : nullptr;
    const float* scale = codes[3 * chunk.expert + 2].input_scale;
    for (long i = 0; i < m; ++i) {
      for (long lane = 0; lane < BLOCK_ROWS; lane += LANES) {
        const long at = j * BLOCK_ROWS + lane, left = p.hidden - at;
        V value = load(gate_c + i * BLOCK_ROWS + lane);
        if (bias) value += load_some(bias + at, left);
        if (p.gated) {
          V up = load(up_c + i * BLOCK_ROWS + lane);
          if (bias) up += load_some(bias + p.hidden + at, left);
          value = p.activation == kClampedSwiglu ? gated_value<kClampedSwiglu>(p, value, up)
                                                 : activate(p.activation, value) * up;
        } else {
          value = activate(p.activation, value);
        }
        if (scale) value *= load_some(scale + at, left);
        store_some(hidden + (chunk.first + first + i) * p.hidden + at, value, left);
      }
    }
  }

  void up(const Chunk& chunk, const Range& range) {
    const CoterieCodes* w = codes + 3 * chunk.expert;
    const Packed a = pack(chunk, p.dim, w->group, w->input_scale, [&](long r) {
      return static_cast<const T*>(p.x) + plan.tokens[r] * p.x_row;
    });
    if (!a.data) return void(failed = true);
    alignas(64) float gate[TOKENS * BLOCK_ROWS], value[TOKENS * BLOCK_ROWS];
    for (long j = range.begin; j < range.end; ++j) {
      for (long first = 0; first < chunk.rows; first += TOKENS) {
        const int m = static_cast<int>(min(TOKENS, chunk.rows - first));
        product<T>(m, w[0], j, a.tile(first, m), p.dim, gate);
        if (p.gated) product<T>(m, w[1], j, a.tile(first, m), p.dim, value);
        finish(chunk, j, first, m, gate, value);
      }
    }
  }

  void down(const Range& range) {
    const long begin = range.begin * BLOCK_ROWS, some = min(p.out, range.end * BLOCK_ROWS) - begin;
    for (long t = 0; t < p.tokens; ++t) __builtin_memset(table + t * p.out + begin, 0, some * sizeof(float));
    for (long i = 0; i < plan.count; ++i) {
      const Chunk& chunk = plan.chunks[i];
      const CoterieCodes& w = codes[3 * chunk.expert + 2];
      const T* bias = p.b_out ? static_cast<const T*>(p.b_out) + chunk.expert * p.out : nullptr;
      const Packed a = pack(chunk, p.hidden, w.group, nullptr, [&](long r) { return hidden + r * p.hidden; });
      if (!a.data) return void(failed = true);
      alignas(64) float c[TOKENS * BLOCK_ROWS];
      for (long j = range.begin; j < range.end; ++j) {
        for (long first = 0; first < chunk.rows; first += TOKENS) {
          const int m = static_cast<int>(min(TOKENS, chunk.rows - first));
          product<T>(m, w, j, a.tile(first, m), p.hidden, c);
          for (int r = 0; r < m; ++r) add(chunk.first + first + r, j, c + r * BLOCK_ROWS, bias);
        }
      }
    }
    if (sizeof(T) == sizeof(float)) return;
    for (long t = 0; t < p.tokens; ++t) {
      const long at = t * p.out + begin;
      for (long i = 0; i < some; i += LANES) {
        store_some(static_cast<T*>(p.y) + at + i, load_some(table + at + i, some - i), some - i);
      }
    }
  }

  // weight · (one row's 16 columns + bias) into the row of its token.
  void add(long row, long j, const float* c, const T* bias) const {
    float* sums = table + plan.tokens[row] * p.out;
    for (long lane = 0; lane < BLOCK_ROWS; lane += LANES) {
      const long at = j * BLOCK_ROWS + lane, left = p.out - at;
      V value = load(c + lane);
      if (bias) value += load_some(bias + at, left);
      store_some(sums + at, load_some(sums + at, left) + plan.weights[row] * value, left);
    }
  }
};

template <class T>
int low_bit(const CoterieMlp& p, const CoterieCodes* codes) {
  using Run = LowBit<T>;
  const Plan plan(p);
  auto* hidden = static_cast<typename Run::Hidden*>(allocate(plan.used * p.hidden * sizeof(typename Run::Hidden)));
  const bool direct = sizeof(T) == sizeof(float);
  auto* table = static_cast<float*>(direct ? p.y : allocate(p.tokens * p.out * sizeof(float)));
  bool ok = plan.ok && hidden && table;
  if (ok) {
    Run run{p, codes, plan, hidden, table};
    const long in_count = ceil_div(p.hidden, BLOCK_ROWS), out_count = ceil_div(p.out, BLOCK_ROWS);
    const long parts = parts_per_chunk(plan.count, p.threads, in_count);
    auto up = [&](long task) { run.up(plan.chunks[task / parts], Range(in_count, parts, task % parts)); };
    parallel(plan.count * parts, p.threads, up);
    const long columns = column_parts(p.threads, out_count);
    auto down = [&](long task) { run.down(Range(out_count, columns, task)); };
    if (!run.failed) parallel(columns, p.threads, down);
    ok = !run.failed;
  }
  release(hidden);
  if (!direct) release(table);
  return ok ? 0 : 1;
}
