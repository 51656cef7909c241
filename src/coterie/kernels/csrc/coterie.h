// The C interface of the native backend: one struct of raw pointers, two calls.
// Letters: T tokens, K slots per token, N = T·K, E experts, D input width, F hidden width, O output width.
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// A bank of matrices [E, rows, cols]; strides in elements. One of row and col must be 1.
struct CoterieBank {
  const void* data;
  int64_t expert, row, col;
  const float* prepacked;  // the same matrices as coterie_prepack leaves them, or null; read by forward alone
};

struct CoterieMlp {
  int64_t tokens, slots, experts, dim, hidden, out;
  int32_t dtype;       // 0 float32, 1 bfloat16
  int32_t activation;  // the order of enum Activation in activation.h
  int32_t gated;       // w_in holds F gate rows, then F up rows
  int32_t interleaved; // gate and up rows take turns in w_in; read by forward alone
  int32_t threads;
  float limit, alpha, shift;  // of a clamped SwiGLU
  const void* x;  // [T, D], rows x_row elements apart
  int64_t x_row;
  const float* weights;    // [T, K]
  const int64_t* order;    // [N] slots sorted by expert
  const int32_t* ends;     // [E] where each group ends in that order
  CoterieBank w_in, w_out;
  const void *b_in, *b_out;  // [E, F or 2F], [E, O], or null
  void* y;                   // [T, O]
  void* pre;                 // [N, F or 2F] pre-activations in expert order: written by forward unless
                             // null, read by backward
  // Backward only. A null output is not computed.
  const void* dy;   // [T, O], rows dy_row elements apart
  int64_t dy_row;
  void* dx;         // [T, D]
  float* dweights;  // [T, K]
  void *dw_in, *dw_out, *db_in, *db_out;  // contiguous
};

// A matrix [rows, columns] of an expert in few bits: element = input_scale · scale · (level − zero), where a
// level is the code's two's complement, or ±1 with one bit. Rows are padded to 16 and columns to 32; the order
// of the codes is told in low_bit_block.h. Scales and zeros: [ceil(rows / 16), groups, 16].
struct CoterieCodes {
  const uint32_t* codes;
  const uint16_t* scales;    // bfloat16
  const int8_t* zeros;       // or null: all 0
  const float* input_scale;  // [columns], or null: all 1
  int32_t bits;              // 1, 2, 3, 4 or 8
  int32_t group;             // columns that share a scale, a multiple of 32
};

// 0, or 1 when memory ran out. The packed banks of coterie_low_bit are codes [E][3]: gate (or the only first
// matrix), up, down, which take the place of w_in and w_out; gate and up share an input scale.
int coterie_forward(const CoterieMlp* mlp);
int coterie_backward(const CoterieMlp* mlp);
int coterie_low_bit(const CoterieMlp* mlp, const CoterieCodes* codes);

// A bank as forward reads it, in the chosen instruction set's own order: matrices · rows rows of each expert (gate,
// then up), `cols` columns. The first call says how many floats that takes.
int64_t coterie_prepacked_floats(int64_t experts, int64_t matrices, int64_t rows, int64_t cols, int32_t dtype);
void coterie_prepack(const CoterieBank* bank, int64_t experts, int64_t matrices, int64_t rows, int64_t cols,
                     int32_t dtype, int32_t interleaved, int32_t threads, float* out);

// Name of the instruction set in use. `limit` caps the choice (0 portable … 3 avx512-bf16).
const char* coterie_isa(int limit);

// For benchmarks: work that keeps every thread's arithmetic, or its memory, busy. The first returns the
// number of multiply-adds it made.
double coterie_multiply_adds(int dtype, int threads);
float coterie_read(const float* data, int64_t count, int threads);

// Switches timing on or off and starts its sums anew. Those until now go to `spent`, unless it is null: ticks per
// kind of work (profile.h), over all threads. Returns the clock in the same ticks.
uint64_t coterie_profile(int32_t on, uint64_t* spent);

// GOMP_parallel of the OpenMP runtime that torch uses, or null for threads of our own.
void coterie_use_openmp(void* gomp_parallel);

// Memory that is kept for the next call once released; and the bytes returned to the system by giving up
// all that is kept.
void* coterie_allocate(size_t bytes);
void coterie_release(void* block);
size_t coterie_release_idle();

// Stable counting sort of `count` expert ids (-1 or ≥ experts: unused, placed last).
void coterie_sort(const int64_t* ids, int64_t count, int64_t experts, int64_t* order, int32_t* ends);
}
#pragma GCC visibility pop
