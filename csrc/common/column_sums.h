// The second stage of a sum over rows in a fixed order: out [columns] = Σ over parts of partials
// [parts, columns], which a first stage has written.
//
// A block owns kSumThreadsX columns; thread (tx, ty) adds up parts ty, ty + kSumThreadsY, … of one,
// and thread (tx, 0) what those have, by way of float [kSumThreadsY, kSumThreadsX] in shared
// memory.
#pragma once

#include "floats.h"
#include "launch.h"
#include "shared.h"

namespace ldit {

constexpr int kSumThreadsX = 8;   // columns of a block: 32 bytes, the least that memory gives
constexpr int kSumThreadsY = 32;  // threads that share a column
constexpr int kSumThreads = kSumThreadsX * kSumThreadsY;

// The sum of what the `kSumThreadsY` threads of a column bring, in their order; threads of ty = 0
// get it. `memory` holds kSumThreads floats.
LDIT_DEVICE float block_column_sum(const Shared<float>& memory, float sum) {
  memory[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kSumThreadsX) return 0.f;
  sum = 0.f;
  for (int ty = 0; ty < kSumThreadsY; ++ty) sum += memory[ty * kSumThreadsX + threadIdx.x];
  return sum;
}

template <int parts_at_once>
__global__ void __launch_bounds__(kSumThreads)
    column_sums(const float* __restrict__ partials, Floats out, std::int64_t parts,
                std::int64_t columns) {
  LDIT_SHARED(float, memory, kSumThreads);
  int ty = threadIdx.x / kSumThreadsX;
  std::int64_t column = std::int64_t(blockIdx.x) * kSumThreadsX + threadIdx.x % kSumThreadsX;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll parts_at_once
    for (std::int64_t part = ty; part < parts; part += kSumThreadsY)
      sum += partials[part * columns + column];
  }
  sum = block_column_sum(memory, sum);
  if (ty == 0 && column < columns) store_float(out, column, sum);
}

inline void launch_column_sums(const float* partials, Floats out, std::int64_t parts,
                               std::int64_t columns, Stream stream) {
  dim3 grid = blocks("column_sums", (columns + kSumThreadsX - 1) / kSumThreadsX);
  launch({"column_sums", grid, kSumThreads, stream}, column_sums<4>, partials, out, parts, columns);
}

}  // namespace ldit
