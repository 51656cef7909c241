// Where the time of a call goes, per kind of work, summed over threads. Off unless asked for: a timed scope
// then costs one predicted branch.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace coterie {

// The order of native_library.PROFILE.
enum Kind { kRowsPacked, kWeightsPacked, kProducts, kFinished, kGradientRowsPacked, kGradientProducts, kGradientsWritten, kKinds };

extern std::atomic<bool> profiling;
extern std::atomic<uint64_t> profile_ticks[kKinds];

inline uint64_t ticks() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

class Timed {
 public:
  explicit Timed(Kind kind) : kind_(kind), start_(profiling.load(std::memory_order_relaxed) ? ticks() : 0) {}
  ~Timed() {
    if (start_) profile_ticks[kind_].fetch_add(ticks() - start_, std::memory_order_relaxed);
  }
  Timed(const Timed&) = delete;

 private:
  const Kind kind_;
  const uint64_t start_;
};

}  // namespace coterie
