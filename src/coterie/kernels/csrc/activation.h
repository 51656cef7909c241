// Activations and their derivatives, to about one unit in the last place of float32.

enum Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSigmoid, kClampedSwiglu };

INLINE V exp(V x) {
  const V low = splat(-87.0f), high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V magic = splat(12582912.0f);  // 1.5·2^23: adding it rounds to an integer
  const V n = (x * 1.44269504f + magic) - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Least maximum relative error on |r| ≤ ln(2)/2: 2e-9.
  V p = r * 0.00138368419f + 0.00837481578f;
  p = p * r + 0.0416682256f;
  p = p * r + 0.166664202f;
  p = p * r + 0.499999921f;
  p = p * r + 1.00000004f;
  p = p * r + 1.0f;
  return p * (V)((__builtin_convertvector(n, VI) + 127) << 23);
}

INLINE V sigmoid(V x) { return 1.0f / (1.0f + exp(-x)); }

// σ(x), and 1 - σ(x) without cancellation where σ is near 1.
INLINE V sigmoid(V x, V* complement) {
  const V e = exp(-x), s = 1.0f / (1.0f + e);
  *complement = e * s;
  return s;
}

// Φ(x), the normal distribution, from erfc(z) = exp(-z²)·t·P(t) with t = 1/(1 + 0.4 z), z = |x|/√2;
// P has least maximum relative error on z in 0 … 14: 2e-8.
INLINE V normal_cdf(V x) {
  const V magnitude = x < 0.0f ? -x : x;
  const V t = 1.0f / (1.0f + magnitude * (0.4f * 0.707106781f));
  V p = t * -0.0231016366f + 0.163407037f;
  p = p * t + -0.419151704f;
  p = p * t + 0.443752139f;
  p = p * t + -0.200491486f;
  p = p * t + 0.22844902f;
  p = p * t + 0.144222799f;
  p = p * t + 0.211928042f;
  p = p * t + 0.225295685f;
  p = p * t + 0.225690122f;
  const V tail = 0.5f * exp(x * x * -0.5f) * t * p;
  return x < 0.0f ? tail : 1.0f - tail;
}

constexpr float kTanhScale = 1.59576912f;  // 2·√(2/π): gelu_tanh(x) = x·sigmoid(scale·(x + 0.044715 x³))

INLINE V gelu_tanh_argument(V x) { return x * kTanhScale * (1.0f + 0.044715f * x * x); }

template <int A>
INLINE V activate(V x) {
  if (A == kSilu) return x / (1.0f + exp(-x));
  if (A == kGelu) return x * normal_cdf(x);
  if (A == kGeluTanh) return x * sigmoid(gelu_tanh_argument(x));
  if (A == kSigmoid) return sigmoid(x);
  const V positive = x < 0.0f ? V{} : x;  // in this form a NaN passes
  return A == kRelu ? positive : positive * positive;
}

// The same where the choice costs little beside the sums that x came from.
INLINE V activate(int activation, V x) {
  switch (activation) {
    case kSilu: return activate<kSilu>(x);
    case kGelu: return activate<kGelu>(x);
    case kGeluTanh: return activate<kGeluTanh>(x);
    case kRelu: return activate<kRelu>(x);
    case kRelu2: return activate<kRelu2>(x);
    default: return activate<kSigmoid>(x);
  }
}

// The activation at x, and its derivative.
template <int A>
INLINE V activate(V x, V* slope) {
  if (A == kSilu) {
    V rest;
    const V s = sigmoid(x, &rest);
    *slope = s + s * x * rest;
    return x * s;
  }
  if (A == kGelu) {
    const V cdf = normal_cdf(x);
    *slope = cdf + x * 0.398942280f * exp(x * x * -0.5f);
    return x * cdf;
  }
  if (A == kGeluTanh) {
    V rest;
    const V s = sigmoid(gelu_tanh_argument(x), &rest);
    *slope = s + x * s * rest * kTanhScale * (1.0f + 3.0f * 0.044715f * x * x);
    return x * s;
  }
  if (A == kSigmoid) {
    V rest;
    const V s = sigmoid(x, &rest);
    *slope = s * rest;
    return s;
  }
  const V positive = x < 0.0f ? V{} : x;
  if (A == kRelu) {
    *slope = x > 0.0f ? splat(1.0f) : V{};
    return positive;
  }
  *slope = 2.0f * positive;
  return positive * positive;
}

// g·σ(α·g)·(u + shift) with g at most `limit` and u within ±limit. In this form a NaN passes.
struct ClampedSwiglu {
  float limit, alpha, shift;

  INLINE V gate(V g) const { return g > limit ? splat(limit) : g; }
  INLINE V up(V u) const {
    u = u > limit ? splat(limit) : u;
    return u < -limit ? splat(-limit) : u;
  }
  INLINE V operator()(V g, V u) const {
    g = gate(g);
    return g / (1.0f + exp(-alpha * g)) * (up(u) + shift);
  }
  // The same, and its derivatives by g and u.
  INLINE V operator()(V g, V u, V* by_gate, V* by_up) const {
    V rest;
    const V low = gate(g), s = sigmoid(alpha * low, &rest), value = low * s, shifted = up(u) + shift;
    *by_gate = g > limit ? V{} : (s + alpha * value * rest) * shifted;
    *by_up = (u > limit) | (u < -limit) ? V{} : value;
    return value * shifted;
  }
};
