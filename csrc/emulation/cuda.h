// The names of CUDA that the kernels use, for a host compiler; nvcc does not read this file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "float16.h"
#include "runtime.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::emulation::now.thread)
#define blockIdx (::emulation::now.block)
#define blockDim (::emulation::now.block_size)
#define gridDim (::emulation::now.grid_size)

using dim3 = emulation::Dim3;

struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads(emulation::Site site = emulation::Site::here()) {
  emulation::block_barrier(site);
}

inline void __syncwarp(unsigned mask = ~0u, emulation::Site site = emulation::Site::here()) {
  emulation::collective("__syncwarp", mask, nullptr, nullptr, true, site);
}

// For what one lane does with what the others have brought: the warp does it at once, which is no
// race.
#define LDIT_AS_ONE __attribute__((no_sanitize("thread")))

namespace emulation {

// The value that a lane gives to a shuffle, and then the one that it gets.
template <class T>
struct Exchange {
  T value;
  unsigned source;
};

template <class T>
T shuffle(const char* what, unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  if (!(mask >> source & 1))
    fail(std::string(what) + " reads lane " + std::to_string(source) + ", not in its mask", site);
  Exchange<T> mine{value, source};
  Perform perform = [](void* const lanes[32], unsigned mask) LDIT_AS_ONE {
    T values[32];
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) values[i] = static_cast<Exchange<T>*>(lanes[i])->value;
    for (unsigned i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      auto* exchange = static_cast<Exchange<T>*>(lanes[i]);
      exchange->value = values[exchange->source];
    }
  };
  collective(what, mask, &mine, perform, false, site);
  return mine.value;
}

inline unsigned vote(const char* what, unsigned mask, bool mine, Site site) {
  unsigned word = mine;
  Perform perform = [](void* const lanes[32], unsigned mask) LDIT_AS_ONE {
    unsigned ballot = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) ballot |= *static_cast<unsigned*>(lanes[i]) << i;
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) *static_cast<unsigned*>(lanes[i]) = ballot;
  };
  collective(what, mask, &word, perform, false, site);
  return word;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulation::Site site = emulation::Site::here()) {
  unsigned lane = emulation::lane(), base = lane / width * width;
  return emulation::shuffle("__shfl_sync", mask, value, base + (source & (width - 1)), site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                  emulation::Site site = emulation::Site::here()) {
  unsigned lane = emulation::lane(), other = lane ^ flip;
  // A lane beyond one's own group of `width` gives one's own value, one before it is read.
  return emulation::shuffle("__shfl_xor_sync", mask, value,
                            other >= (lane / width + 1) * width ? lane : other, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   emulation::Site site = emulation::Site::here()) {
  unsigned lane = emulation::lane(), end = (lane / width + 1) * width;
  return emulation::shuffle("__shfl_down_sync", mask, value, lane + by < end ? lane + by : lane,
                            site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                 emulation::Site site = emulation::Site::here()) {
  unsigned lane = emulation::lane(), begin = lane / width * width;
  return emulation::shuffle("__shfl_up_sync", mask, value, lane >= begin + by ? lane - by : lane,
                            site);
}

inline unsigned __ballot_sync(unsigned mask, int mine,
                              emulation::Site site = emulation::Site::here()) {
  return emulation::vote("__ballot_sync", mask, mine != 0, site);
}

inline int __any_sync(unsigned mask, int mine, emulation::Site site = emulation::Site::here()) {
  return emulation::vote("__any_sync", mask, mine != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int mine, emulation::Site site = emulation::Site::here()) {
  return emulation::vote("__all_sync", mask, mine != 0, site) == mask;
}

// Macros, because glibc declares functions of these names.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __fdividef(x, y) ((x) / (y))
#define exp2f(x) ::std::exp2(static_cast<float>(x))

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline unsigned __float_as_uint(float value) { return emulation::bits_of(value); }
inline float __uint_as_float(unsigned bits) { return emulation::float_of(bits); }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

template <class T, class U>
constexpr std::common_type_t<T, U> min(T a, U b) {
  return b < a ? b : a;
}
template <class T, class U>
constexpr std::common_type_t<T, U> max(T a, U b) {
  return a < b ? b : a;
}
