// Work space that is kept between calls: the first touch of fresh memory costs more than a small product.
#pragma once

#include <cstddef>

namespace coterie {

// At least `bytes`, 64-byte aligned, huge pages behind large blocks; null when memory ran out.
void* allocate(size_t bytes);
void release(void* block);

// Scratch of the calling thread, 64-byte aligned, kept for the thread's next call. `slot` < 3 names one of
// its buffers. Null when memory ran out.
void* scratch(int slot, size_t bytes);

// A number no other call in this process has had. Blocks unused for many calls go back to the system.
unsigned long next_call();

}  // namespace coterie
