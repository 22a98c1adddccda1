// Conversions between float and the 16-bit types, and the switch from a dtype known at run time to
// a type.
#pragma once

#include "../ops.h"
#include "platform.h"

namespace ldit {

LDIT_DEVICE float to_float(float value) { return value; }
#ifdef LDIT_EMULATED
inline float to_float(bf16 value) { return value.to_float32(); }
inline float to_float(fp16 value) { return value.to_float32(); }
#else
LDIT_DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
LDIT_DEVICE float to_float(fp16 value) { return __half2float(value); }
#endif

// To the nearest, ties to even.
template <class T>
LDIT_DEVICE T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
#ifdef LDIT_EMULATED
    return T::round(value);
#else
    if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(value);
    else return __float2half_rn(value);
#endif
  }
}

// Two neighbours in the 32 bits that a matrix fragment holds them in, the first in the low half.
template <class T>
LDIT_DEVICE std::uint32_t pack(float low, float high) {
  T both[2] = {from_float<T>(low), from_float<T>(high)};
  std::uint32_t word;
  memcpy(&word, both, 4);
  return word;
}

template <class T>
LDIT_DEVICE float2 unpack(std::uint32_t word) {
  T both[2];
  memcpy(both, &word, 4);
  return {to_float(both[0]), to_float(both[1])};
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls `use(TypeTag<T>{})` for the type of `dtype`.
template <class Use>
void dispatch(DType dtype, Use&& use) {
  switch (dtype) {
    case DType::float32: return use(TypeTag<float>{});
    case DType::float16: return use(TypeTag<fp16>{});
    case DType::bfloat16: return use(TypeTag<bf16>{});
  }
  throw LaunchError("a dtype that is none of float32, float16, bfloat16");
}

}  // namespace ldit
