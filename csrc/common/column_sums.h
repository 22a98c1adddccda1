// The second stage of a deterministic sum over rows: partial sums [parts, columns] of a first stage
// become one row.
#pragma once

#include "floats.h"
#include "launch.h"
#include "shared.h"

namespace ldit {

constexpr int kSumColumns = 8;  // 32 bytes: the least that memory gives
constexpr int kSumParts = 32;   // taken side by side
constexpr int kSumThreads = kSumColumns * kSumParts;

// Adds what the `kSumParts` threads of a column have summed, in their order; the result is that of
// side 0.
LDIT_DEVICE float sum_sides(const Shared<float>& memory, float sum) {
  memory[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kSumColumns) return 0.f;
  sum = 0.f;
  for (int side = 0; side < kSumParts; ++side) sum += memory[side * kSumColumns + threadIdx.x];
  return sum;
}

template <int parts_at_once>
__global__ void __launch_bounds__(kSumThreads)
    column_sums(const float* __restrict__ partials, Floats out, std::int64_t parts,
                std::int64_t columns) {
  LDIT_SHARED(float, memory, kSumThreads);
  int side = threadIdx.x / kSumColumns;
  std::int64_t column = std::int64_t(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll parts_at_once
    for (std::int64_t part = side; part < parts; part += kSumParts)
      sum += partials[part * columns + column];
  }
  sum = sum_sides(memory, sum);
  if (side == 0 && column < columns) store_float(out, column, sum);
}

inline void launch_column_sums(const float* partials, Floats out, std::int64_t parts,
                               std::int64_t columns, Stream stream) {
  dim3 grid = blocks("column_sums", (columns + kSumColumns - 1) / kSumColumns);
  launch({"column_sums", grid, kSumThreads, stream}, column_sums<4>, partials, out, parts, columns);
}

}  // namespace ldit
