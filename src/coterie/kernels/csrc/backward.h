// Backward, in three steps: G = dy·W_out with everything elementwise done on it while in registers;
// dx = dpre·W_in, split by columns as forward's sum is; the weights' gradients, expert by expert.
// The combine weight's gradient is ⟨dy, W_out h⟩ = ⟨G, h⟩: no output of a single slot is needed.

template <class T>
struct Backward {
  const CoterieMlp& p;
  const Plan& plan;
  T* dpre;         // [used, F or 2F] gradient of the pre-activations
  T* scaled;       // [used, F] weight · hidden
  float* partial;  // [used, panels] pieces of ⟨G, h⟩
  Sums table;      // [T, D]
  const unsigned long up_phase = next_call(), down_phase = next_call();
  volatile bool failed = false;

  long wide() const { return p.gated ? 2 * p.hidden : p.hidden; }
  long panels() const { return ceil_div(p.hidden, WIDTH); }
  Rows<T> dy() const { return {static_cast<const T*>(p.dy), p.dy_row, plan.tokens}; }
  Rows<T> x() const { return {static_cast<const T*>(p.x), p.x_row, plan.tokens}; }

  template <int A>
  void finish_hidden(long j, long row, int m, const float* c, long ldc) {
    const long left = p.hidden - j * WIDTH;
    for (int i = 0; i < m; ++i, ++row) {
      const T* pre = static_cast<const T*>(p.pre) + row * wide() + j * WIDTH;
      T* out = dpre + row * wide() + j * WIDTH;
      const float weight = plan.weights[row];
      V dot = {};
      for (int g = 0; g < WIDTH; g += LANES) {
        const V grad = load(c + i * ldc + g), gate = load_some(pre + g, left - g);
        V slope, value, factor = splat(1.0f);
        if (p.gated) {
          V by_up, up = load_some(pre + p.hidden + g, left - g);
          if (A == kClampedSwiglu) {
            value = ClampedSwiglu{p.limit, p.alpha, p.shift}(gate, up, &slope, &by_up);
          } else {
            by_up = activate<A>(gate, &slope);
            value = by_up * up, factor = up;
          }
          store_some(out + p.hidden + g, weight * grad * by_up, left - g);
        } else {
          value = activate<A>(gate, &slope);
        }
        store_some(out + g, weight * grad * slope * factor, left - g);
        store_some(scaled + row * p.hidden + j * WIDTH + g, weight * value, left - g);
        dot += grad * value;
      }
      partial[row * panels() + j] = sum_lanes(dot);
    }
  }

  void finish(long j, long row, int m, const float* c, long ldc) {
    switch (p.activation) {
      case kSilu: return finish_hidden<kSilu>(j, row, m, c, ldc);
      case kGelu: return finish_hidden<kGelu>(j, row, m, c, ldc);
      case kGeluTanh: return finish_hidden<kGeluTanh>(j, row, m, c, ldc);
      case kRelu: return finish_hidden<kRelu>(j, row, m, c, ldc);
      case kRelu2: return finish_hidden<kRelu2>(j, row, m, c, ldc);
      case kClampedSwiglu: return finish_hidden<kClampedSwiglu>(j, row, m, c, ldc);
      default: return finish_hidden<kSigmoid>(j, row, m, c, ldc);
    }
  }

  void hidden(long c, const Range& range) {
    const Chunk& chunk = plan.chunks[c];
    const float* a = packed_chunk(dy(), chunk, p.out, up_phase);
    auto* packed = static_cast<float*>(scratch(1, kPanelFloats * sizeof(float)));
    auto* sums = static_cast<float*>(scratch(2, kSumFloats * sizeof(float)));
    if (!a || !packed || !sums) return void(failed = true);
    for (long j = range.begin; j < range.end; ++j) {
      Multiply<T> job{a, chunk, p.out, {backward_panel<T>(p.w_out, chunk.expert, p.hidden, j)}, 1, {}};
      const bool more = j + 1 < range.end;
      if (more || c + 1 < plan.count) {
        const long expert = more ? chunk.expert : plan.chunks[c + 1].expert;
        prefetch_panel(job.ahead, backward_panel<T>(p.w_out, expert, p.hidden, more ? j + 1 : 0), p.out);
      }
      multiply(job, packed, sums, [](long, int) {}, [&](long first, int m, const float* out, long ldc) {
        finish(j, chunk.first + first, m, out, ldc);
      });
    }
  }

  void tokens(const Range& range) {
    auto* packed = static_cast<float*>(scratch(1, kPanelFloats * sizeof(float)));
    auto* sums = static_cast<float*>(scratch(2, kSumFloats * sizeof(float)));
    if (!packed || !sums) return void(failed = true);
    table.clear(p.tokens, range);
    for (long c = 0; c < plan.count; ++c) {
      const Chunk& chunk = plan.chunks[c];
      const float* a = packed_chunk(Rows<T>{dpre, wide(), nullptr}, chunk, wide(), down_phase);
      if (!a) return void(failed = true);
      for (long j = range.begin; j < range.end; ++j) {
        Multiply<T> job{a, chunk, wide(), {backward_panel<T>(p.w_in, chunk.expert, p.dim, j)}, 1, {}};
        const bool more = j + 1 < range.end;
        if (more || c + 1 < plan.count) {
          const long expert = more ? chunk.expert : plan.chunks[c + 1].expert;
          prefetch_panel(job.ahead, backward_panel<T>(p.w_in, expert, p.dim, more ? j + 1 : range.begin),
                         wide());
        }
        const int32_t* rows = plan.tokens + chunk.first;
        const auto expect = [&](long first, int m) { table.expect(rows + first, m, j); };
        multiply(job, packed, sums, expect, [&](long first, int m, const float* out, long ldc) {
          table.add(rows + first, m, j, out, ldc);
        });
      }
    }
    table.round(p.tokens, range, static_cast<T*>(p.dx));
  }

  // Gradients of one expert's biases and of its slots' combine weights.
  void vectors(long expert) {
    const long first = expert ? p.ends[expert - 1] : 0, last = p.ends[expert];
    if (p.db_in) column_sums(Rows<T>{dpre, wide(), nullptr}, nullptr, first, last, wide(),
                             static_cast<T*>(p.db_in) + expert * wide());
    if (p.db_out) column_sums(dy(), plan.weights, first, last, p.out,
                              static_cast<T*>(p.db_out) + expert * p.out);
    if (!p.dweights) return;
    const T* bias = p.b_out ? static_cast<const T*>(p.b_out) + expert * p.out : nullptr;
    for (long r = first; r < last; ++r) {
      float sum = 0;
      for (long j = 0; j < panels(); ++j) sum += partial[r * panels() + j];
      if (bias) {
        V dot = {};
        for (long i = 0; i < p.out; i += LANES) {
          dot += load_some(dy()[r] + i, p.out - i) * load_some(bias + i, p.out - i);
        }
        sum += sum_lanes(dot);
      }
      p.dweights[p.order[r]] = sum;
    }
  }

  void column_sums(const Rows<T>& rows, const float* weights, long first, long last, long columns, T* out) {
    for (long i = 0; i < columns; i += LANES) {
      V sum = {};
      for (long r = first; r < last; ++r) {
        const V v = load_some(rows[r] + i, columns - i);
        sum += weights ? weights[r] * v : v;
      }
      store_some(out + i, sum, columns - i);
    }
  }
};

template <class T>
int backward(const CoterieMlp& p) {
  const Plan plan(p);
  const bool direct = sizeof(T) == sizeof(float);
  const long wide = p.gated ? 2 * p.hidden : p.hidden, panels = ceil_div(p.hidden, WIDTH);
  auto* dpre = static_cast<T*>(allocate(plan.used * wide * sizeof(T)));
  auto* scaled = static_cast<T*>(allocate(plan.used * p.hidden * sizeof(T)));
  auto* partial = static_cast<float*>(allocate(plan.used * panels * sizeof(float)));
  auto* sums32 = static_cast<float*>(direct || !p.dx ? p.dx : allocate(p.tokens * p.dim * sizeof(float)));
  bool ok = plan.ok && dpre && scaled && partial && (sums32 || !p.dx);
  if (ok) {
    Backward<T> run{p, plan, dpre, scaled, partial, {sums32, p.dim}};
    const long parts = parts_per_chunk(plan.count, p.threads, panels);
    auto hidden = [&](long task) { run.hidden(task / parts, Range(panels, parts, task % parts)); };
    parallel(plan.count * parts, p.threads, hidden);
    const long count = ceil_div(p.dim, WIDTH), columns = column_parts(p.threads, count);
    auto tokens = [&](long task) { run.tokens(Range(count, columns, task)); };
    if (p.dx && !run.failed) parallel(columns, p.threads, tokens);
    auto vectors = [&](long expert) { run.vectors(expert); };
    if (p.dweights) __builtin_memset(p.dweights, 0, p.tokens * p.slots * sizeof(float));
    if (p.dweights || p.db_in || p.db_out) parallel(p.experts, p.threads, vectors);
    const bool large = p.experts * p.out * p.hidden * long{sizeof(T)} > (8l << 20);
    if (p.dw_out && !run.failed) {
      Outer<T> outer{run.dy(), {scaled, p.hidden, nullptr}, p.out, p.hidden, static_cast<T*>(p.dw_out), p.ends, large};
      run.failed = !outer.run(p.experts, p.threads);
    }
    if (p.dw_in && !run.failed) {
      Outer<T> outer{{dpre, wide, nullptr}, run.x(), wide, p.dim, static_cast<T*>(p.dw_in), p.ends, large};
      run.failed = !outer.run(p.experts, p.threads);
    }
    ok = !run.failed;
  }
  release(dpre), release(scaled), release(partial);
  if (!direct) release(sums32);
  return ok ? 0 : 1;
}
