// Sums and maxima within a warp and sums within a block, always in the same order, so that every
// run gives the same bits.
#pragma once

#include "shared.h"

namespace ldit {

// The value of the lane whose number differs in the bits of `flip`. All 32 lanes call it.
LDIT_DEVICE float from_lane_across(float value, int flip,
                                   [[maybe_unused]] Site site = Site::here()) {
#ifdef LDIT_EMULATED
  return __shfl_xor_sync(kFullMask, value, flip, kWarp, site);
#else
  return __shfl_xor_sync(kFullMask, value, flip);
#endif
}

// The sum over groups of `lanes` neighbouring lanes, a power of two, in every lane. All 32 lanes
// call it.
LDIT_DEVICE float warp_sum(float value, int lanes = kWarp, Site site = Site::here()) {
#pragma unroll
  for (int flip = kWarp / 2; flip > 0; flip /= 2)
    if (flip < lanes) value += from_lane_across(value, flip, site);
  return value;
}

// The largest of the group, likewise.
LDIT_DEVICE float warp_max(float value, int lanes = kWarp, Site site = Site::here()) {
#pragma unroll
  for (int flip = kWarp / 2; flip > 0; flip /= 2)
    if (flip < lanes) value = fmaxf(value, from_lane_across(value, flip, site));
  return value;
}

// Sums `count` values at once over all threads of a one-dimensional block of at most 1024 threads,
// a multiple of 32.
//
// One barrier for each call: `round` alternates between 0 and 1 from call to call, so that a fast
// warp writes to the half that a slow one is not reading. Two calls with the same `round` in a row
// are a race.
template <int count>
class BlockSums {
 public:
  static constexpr int size = 2 * count * kWarp;  // floats of shared memory

  LDIT_DEVICE explicit BlockSums(Shared<float> memory) : memory_(memory) {}

  LDIT_DEVICE void operator()(float (&values)[count], int round) const {
    int lane = lane_index(), warp = warp_index(), warps = blockDim.x / kWarp, group = 1;
    while (group < warps) group *= 2;
    Shared<float> half = memory_.part(round * count * kWarp, count * kWarp);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = warp_sum(values[i]);
      if (lane == 0) half[i * kWarp + warp] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; ++i) {
      int of_warp = lane & (group - 1);
      values[i] = warp_sum(of_warp < warps ? half[i * kWarp + of_warp] : 0.f, group);
    }
  }

 private:
  Shared<float> memory_;
};

}  // namespace ldit
