#include "profile.h"

#include "coterie.h"

namespace coterie {

std::atomic<bool> profiling{false};
std::atomic<uint64_t> profile_ticks[kKinds] = {};

}  // namespace coterie

uint64_t coterie_profile(int32_t on, uint64_t* spent) {
  using namespace coterie;
  for (int i = 0; i < kKinds; ++i) {
    const uint64_t sum = profile_ticks[i].exchange(0);
    if (spent) spent[i] = sum;
  }
  profiling = on != 0;
  return ticks();
}
