// bfloat16 and float16 of the emulation, bit for bit as a device converts them: round to nearest,
// ties to even, NaN kept.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulation {

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct bfloat16 {
  std::uint16_t bits;

  static bfloat16 round(float value) {
    std::uint32_t word = bits_of(value);
    if (std::isnan(value)) return {0x7fff};
    return {static_cast<std::uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
  }
  float to_float32() const { return float_of(std::uint32_t(bits) << 16); }
};

struct float16 {
  std::uint16_t bits;

  static float16 round(float value) {
    std::uint32_t word = bits_of(value), sign = word >> 16 & 0x8000, size = word & 0x7fffffff;
    if (size > 0x7f800000) return {0x7fff};
    // 65520 and more round to infinity.
    if (size >= 0x477ff000) return {static_cast<std::uint16_t>(sign | 0x7c00)};
    // Below 2^-14 the spacing is 2^-24: adding 0.5, whose last bit is worth that, leaves the
    // rounded multiple at the end.
    if (size < 0x38800000)
      return {static_cast<std::uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000))};
    // The exponent's bias goes from 127 to 15.
    std::uint32_t rounded = size + 0xfff + (size >> 13 & 1) - (112u << 23);
    return {static_cast<std::uint16_t>(sign | rounded >> 13)};
  }
  float to_float32() const {
    std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16, size = bits & 0x7fff;
    if (size >= 0x7c00) return float_of(sign | 0x7f800000 | (size & 0x3ff) << 13);
    if (size < 0x400) return float_of(sign | bits_of(float(size) * 0x1p-24f));
    return float_of(sign | ((size << 13) + (112u << 23)));
  }
};

}  // namespace emulation
