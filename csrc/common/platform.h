// The names of CUDA, from nvcc or, in the emulation, from emulation/cuda.h for a host compiler, and
// those of lanes and warps. The other headers include this one and are the same for both compilers.
#pragma once

#ifdef LDIT_EMULATED
#include "../emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

#define LDIT_DEVICE __device__ __forceinline__

namespace ldit {

#ifdef LDIT_EMULATED
using bf16 = emulation::bfloat16;
using fp16 = emulation::float16;
using Site = emulation::Site;
#else
using bf16 = __nv_bfloat16;
using fp16 = __half;
// Where a helper was called from; the emulation names it in its errors, a device has no use for it.
struct Site {
  static constexpr __host__ __device__ Site here() { return {}; }
};
#endif

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

LDIT_DEVICE int lane_index() { return threadIdx.x % kWarp; }
LDIT_DEVICE int warp_index() { return threadIdx.x / kWarp; }

}  // namespace ldit
