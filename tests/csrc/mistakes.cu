// Kernels with one mistake each that the emulation has to find; with `wrong` false, without it.
#include "common/async_copy.h"
#include "common/mma.h"
#include "common/reduce.h"
#include "common/vector.h"
#include "interface.h"

using namespace ldit;

namespace {

// Each thread reads what the next has written; out[i] = i + 1.
template <bool wrong>
__global__ void write_read(float* out) {
  LDIT_SHARED(float, memory, 64);
  memory[threadIdx.x] = threadIdx.x;
  if (!wrong) __syncthreads();
  out[threadIdx.x] = memory[(threadIdx.x + 1) % 64];
}

// Writes again what others may not have read yet; out[i] = i + 1, then + 100.
template <bool wrong>
__global__ void read_write(float* out) {
  LDIT_SHARED(float, memory, 64);
  for (int round = 0; round < 2; ++round) {
    memory[threadIdx.x] = threadIdx.x + 100 * round;
    __syncthreads();
    out[round * 64 + threadIdx.x] = memory[(threadIdx.x + 1) % 64];
    if (!wrong) __syncthreads();
  }
}

template <bool wrong>
__global__ void within_warp(float* out) {
  LDIT_SHARED(float, memory, 32);
  memory[lane_index()] = lane_index();
  if (!wrong) __syncwarp();
  out[threadIdx.x] = memory[lane_index() ^ 1];
}

// The shuffle orders the lanes in the emulation's plain build; only a race detector sees that
// nothing orders the memory.
template <bool wrong>
__global__ void shuffle_for_barrier(float* out) {
  LDIT_SHARED(float, memory, 32);
  memory[lane_index()] = lane_index();
  float sum = warp_sum(1.f);
  if (!wrong) __syncwarp();
  out[threadIdx.x] = memory[lane_index() ^ 1] + 0.f * sum;
}

// Half of a warp sums; the mask names all of it.
template <bool wrong>
__global__ void shuffle_mask(float* out) {
  float value = 1.f;
  if (threadIdx.x < 16) {
    for (int flip = 8; flip > 0; flip /= 2)
      value += __shfl_xor_sync(wrong ? kFullMask : 0xffffu, value, flip);
  }
  out[threadIdx.x] = value;
}

// Reads a lane that the mask leaves out.
template <bool wrong>
__global__ void shuffle_outside(float* out) {
  float value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_xor_sync(0xffffu, value, wrong ? 16 : 8);
  out[threadIdx.x] = value;
}

// Lanes of one warp wait in two different places.
template <bool wrong>
__global__ void diverged_shuffle(float* out) {
  float value = threadIdx.x;
  if (wrong && threadIdx.x % 2) value = __shfl_xor_sync(kFullMask, value, 1);
  else value = __shfl_xor_sync(wrong ? kFullMask : kFullMask, value, 1);
  out[threadIdx.x] = value;
}

template <bool wrong>
__global__ void early_return(float* out) {
  LDIT_SHARED(float, memory, 64);
  if (wrong && threadIdx.x >= 48) return;
  memory[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = memory[63 - threadIdx.x];
}

template <bool wrong>
__global__ void two_barriers(float* out) {
  if (wrong && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.f;
}

template <bool wrong>
__global__ void past_the_end(float* out) {
  LDIT_SHARED(float, memory, 64);
  memory[threadIdx.x + (wrong ? 1 : 0)] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = memory[threadIdx.x];
}

template <bool wrong>
__global__ void dynamic_past_the_end(float* out) {
  DynamicShared dynamic;
  auto memory = dynamic.take<float>(wrong ? 65 : 64);
  memory[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = memory[threadIdx.x];
}

// The last thread's vector of 4 ends beyond the 65 elements there are.
template <bool wrong>
__global__ void vector_past_the_end(const float* in, float* out) {
  if (4 * threadIdx.x >= 65) return;
  auto raw = wrong || 4 * threadIdx.x + 4 <= 65 ? load<4>(in + 4 * threadIdx.x)
                                                : load_tail<4>(in + 4 * threadIdx.x, 1);
  out[threadIdx.x] = raw[0];
}

template <bool wrong>
__global__ void misaligned(const float* in, float* out) {
  out[threadIdx.x] = load<4>(in + 4 * threadIdx.x + (wrong ? 1 : 0))[0];
}

template <bool wrong>
__global__ void unwaited_copy(const float* in, float* out) {
  LDIT_SHARED(float, memory, 128);
  copy16(memory.span(4 * threadIdx.x, 4), in + 4 * threadIdx.x);
  commit_copies();
  if (!wrong) wait_copies<0>();
  __syncthreads();
  out[threadIdx.x] = memory[threadIdx.x];
}

// Same value or not: two threads write one place.
template <bool wrong>
__global__ void all_write(float* out) {
  if (!wrong && threadIdx.x > 0) return;
  out[0] = 1.f;
}

// Blocks write one place.
template <bool wrong>
__global__ void blocks_write(float* out) {
  if (threadIdx.x == blockIdx.x) out[wrong ? 0 : blockIdx.x] = 1.f;
}

}  // namespace

#define RUN(name, blocks, threads, ...)                                                     \
  EXPORT const char* run_##name(bool wrong, [[maybe_unused]] const float* in, float* out) { \
    return caught([&] {                                                                     \
      LaunchConfig config{#name, dim3(blocks), threads, nullptr, 256};                      \
      if (wrong) launch(config, name<true>, __VA_ARGS__);                                   \
      else launch(config, name<false>, __VA_ARGS__);                                        \
    });                                                                                     \
  }

RUN(write_read, 1, 64, out)
RUN(read_write, 1, 64, out)
RUN(within_warp, 1, 32, out)
RUN(shuffle_for_barrier, 1, 32, out)
RUN(shuffle_mask, 1, 32, out)
RUN(shuffle_outside, 1, 32, out)
RUN(diverged_shuffle, 1, 32, out)
RUN(early_return, 1, 64, out)
RUN(two_barriers, 1, 64, out)
RUN(past_the_end, 1, 64, out)
RUN(dynamic_past_the_end, 1, 64, out)
RUN(vector_past_the_end, 1, 32, in, out)
RUN(misaligned, 1, 16, in, out)
RUN(unwaited_copy, 1, 32, in, out)
RUN(all_write, 1, 32, out)
RUN(blocks_write, 2, 32, out)
