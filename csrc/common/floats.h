// Access to arrays of floats whose dtype is known at run time only: for what a kernel reads or
// writes too rarely to be compiled for every dtype of it.
#pragma once

#include "vector.h"

namespace ldit {

namespace detail {

template <bool aligned, class T, int count>
LDIT_DEVICE void load_as_float(const void* array, std::int64_t offset, int valid,
                               float (&to)[count]) {
  auto raw = load_some<aligned, count>(static_cast<const T*>(array) + offset, valid);
#pragma unroll
  for (int j = 0; j < count; ++j) to[j] = raw[j];
}

}  // namespace detail

// The first `valid` of `count` neighbours; `aligned`: `valid` is `count` or 0, and the address a
// multiple of one access. The others,
// and a null array, are 0.
template <bool aligned, int count>
LDIT_DEVICE void load_floats(const Floats& array, std::int64_t offset, int valid,
                             float (&to)[count]) {
#pragma unroll
  for (int j = 0; j < count; ++j) to[j] = 0.f;
  if (valid == 0 || array.data == nullptr) return;
  switch (array.dtype) {
    case DType::float32:
      return detail::load_as_float<aligned, float>(array.data, offset, valid, to);
    case DType::float16: return detail::load_as_float<aligned, fp16>(array.data, offset, valid, to);
    case DType::bfloat16:
      return detail::load_as_float<aligned, bf16>(array.data, offset, valid, to);
  }
}

LDIT_DEVICE float load_float(const Floats& array, std::int64_t i) {
  switch (array.dtype) {
    case DType::float16: return to_float(static_cast<const fp16*>(array.data)[i]);
    case DType::bfloat16: return to_float(static_cast<const bf16*>(array.data)[i]);
    default: return static_cast<const float*>(array.data)[i];
  }
}

// Nothing if the array is null.
LDIT_DEVICE void store_float(const Floats& array, std::int64_t i, float value) {
  if (array.data == nullptr) return;
  switch (array.dtype) {
    case DType::float16: static_cast<fp16*>(array.data)[i] = from_float<fp16>(value); break;
    case DType::bfloat16: static_cast<bf16*>(array.data)[i] = from_float<bf16>(value); break;
    default: static_cast<float*>(array.data)[i] = value;
  }
}

}  // namespace ldit
