#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "coterie.h"

namespace coterie {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallest = 2 * kHugePage;  // the system's allocator recycles what is smaller itself
constexpr unsigned long kIdleCalls = 4096;   // some steps of a model with a hundred layers

struct Idle {
  void* data;
  size_t bytes;
  unsigned long since;
};

struct Pool {
  std::mutex mutex;
  std::unordered_map<void*, size_t> used;
  std::vector<Idle> idle;
};

// Never destroyed: tensors may outlive the library's static objects.
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}

// A fork while another thread holds the lock would leave the child waiting for a thread it does not have.
const int fork_guard = pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                                      [] { pool().mutex.unlock(); });

std::atomic<unsigned long> calls{0};

// Rounded up by at most a quarter, so that a slightly different batch finds its block again.
size_t rounded(size_t bytes) {
  size_t step = kHugePage;
  while (step * 8 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void give_back(std::vector<Idle>& idle, unsigned long before) {
  size_t kept = 0;
  for (const Idle& block : idle) {
    if (block.since < before) std::free(block.data);
    else idle[kept++] = block;
  }
  idle.resize(kept);
}

struct Scratch {
  void* data[3] = {};
  size_t bytes[3] = {};
  ~Scratch() {
    for (void* p : data) std::free(p);
  }
};

thread_local Scratch own;

}  // namespace

void* allocate(size_t bytes) {
  void* p = nullptr;
  if (bytes < kSmallest) return posix_memalign(&p, 64, bytes ? bytes : 1) ? nullptr : p;
  bytes = rounded(bytes);
  const std::lock_guard<std::mutex> lock(pool().mutex);
  auto& idle = pool().idle;
  for (size_t i = idle.size(); i-- > 0;) {  // the latest first: it is the likeliest to be in the cache
    if (idle[i].bytes != bytes) continue;
    p = idle[i].data;
    idle.erase(idle.begin() + static_cast<long>(i));
    break;
  }
  if (!p) {
    if (posix_memalign(&p, kHugePage, bytes)) {
      give_back(idle, ~0ul);
      if (posix_memalign(&p, kHugePage, bytes)) return nullptr;
    }
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
  }
  try {
    pool().used[p] = bytes;
  } catch (const std::bad_alloc&) {
    std::free(p);
    return nullptr;
  }
  return p;
}

void release(void* block) {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  const auto found = pool().used.find(block);
  if (found == pool().used.end()) return std::free(block);
  const size_t bytes = found->second;
  pool().used.erase(found);
  const unsigned long now = calls;
  if (now > kIdleCalls) give_back(pool().idle, now - kIdleCalls);
  try {
    pool().idle.push_back({block, bytes, now});
  } catch (const std::bad_alloc&) {
    std::free(block);
  }
}

void* scratch(int slot, size_t bytes) {
  if (own.bytes[slot] < bytes) {
    std::free(own.data[slot]);
    own.bytes[slot] = 0;
    own.data[slot] = nullptr;
    if (!posix_memalign(&own.data[slot], 64, bytes)) own.bytes[slot] = bytes;
  }
  return own.bytes[slot] < bytes ? nullptr : own.data[slot];
}

unsigned long next_call() { return ++calls; }

}  // namespace coterie

void* coterie_allocate(size_t bytes) { return coterie::allocate(bytes); }

void coterie_release(void* block) { coterie::release(block); }

size_t coterie_release_idle() {
  const std::lock_guard<std::mutex> lock(coterie::pool().mutex);
  size_t bytes = 0;
  for (const auto& block : coterie::pool().idle) bytes += block.bytes;
  coterie::give_back(coterie::pool().idle, ~0ul);
  return bytes;
}
