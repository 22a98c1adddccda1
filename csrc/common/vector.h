// Loads and stores of neighbouring elements, 16 bytes in one instruction where the address allows
// it, and their conversion to and from float.
#pragma once

#include "convert.h"

namespace ldit {

// `count` elements as one access of their total size, which must divide their address: at most 16
// bytes.
template <class T, int count>
struct alignas(sizeof(T) * count) Packed {
  static_assert(sizeof(T) * count <= 16, "no wider access exists");
  T value[count];
};

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements in 16 bytes

inline bool is_aligned(const void* pointer, std::int64_t bytes = 16) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

namespace detail {

template <class T, int count>
LDIT_DEVICE Packed<T, count> load_packed(const T* from, Site site) {
#ifdef LDIT_EMULATED
  if (!is_aligned(from, sizeof(T) * count))
    emulation::fail("a load from a misaligned address", site);
#endif
  return *reinterpret_cast<const Packed<T, count>*>(from);
}

template <class T, int count>
LDIT_DEVICE void store_packed(T* to, const Packed<T, count>& packed, Site site) {
#ifdef LDIT_EMULATED
  if (!is_aligned(to, sizeof(T) * count)) emulation::fail("a store to a misaligned address", site);
#endif
  *reinterpret_cast<Packed<T, count>*>(to) = packed;
}

template <class T, int count>
constexpr int kPiece = count < kVector<T> ? count : kVector<T>;

}  // namespace detail

// `count` neighbours as they are in memory; loads of several rows are issued together when kept
// like this.
template <class T, int count>
struct Raw {
  static constexpr int piece = detail::kPiece<T, count>;
  static_assert(count % piece == 0);
  Packed<T, piece> pieces[count / piece];

  LDIT_DEVICE float operator[](int i) const { return to_float(pieces[i / piece].value[i % piece]); }
  LDIT_DEVICE void set(int i, float value) {
    pieces[i / piece].value[i % piece] = from_float<T>(value);
  }
};

// Loads `count` elements in accesses of up to 16 bytes: `from` is aligned to the size of one
// access.
template <int count, class T>
LDIT_DEVICE Raw<T, count> load(const T* from, Site site = Site::here()) {
  Raw<T, count> raw;
#pragma unroll
  for (int i = 0; i < count / raw.piece; ++i) {
    raw.pieces[i] = detail::load_packed<T, Raw<T, count>::piece>(from + i * raw.piece, site);
  }
  return raw;
}

// Loads the first `valid` of `count` elements one by one, from any address; the others are 0.
template <int count, class T>
LDIT_DEVICE Raw<T, count> load_tail(const T* from, std::int64_t valid) {
  Raw<T, count> raw;
#pragma unroll
  for (int i = 0; i < count; ++i)
    raw.pieces[i / raw.piece].value[i % raw.piece] = i < valid ? from[i] : from_float<T>(0.f);
  return raw;
}

template <class T, int count>
LDIT_DEVICE void store(T* to, const Raw<T, count>& raw, Site site = Site::here()) {
#pragma unroll
  for (int i = 0; i < count / raw.piece; ++i)
    detail::store_packed<T, Raw<T, count>::piece>(to + i * raw.piece, raw.pieces[i], site);
}

template <class T, int count>
LDIT_DEVICE void store_tail(T* to, const Raw<T, count>& raw, std::int64_t valid) {
#pragma unroll
  for (int i = 0; i < count; ++i)
    if (i < valid) to[i] = raw.pieces[i / raw.piece].value[i % raw.piece];
}

// Loads `count` elements in vectors if `aligned` says at compile time that the address allows it,
// else the first `valid` one by one.
template <bool aligned, int count, class T>
LDIT_DEVICE Raw<T, count> load_some(const T* from, std::int64_t valid, Site site = Site::here()) {
  if constexpr (aligned) return load<count>(from, site);
  else return load_tail<count>(from, valid);
}

template <bool aligned, class T, int count>
LDIT_DEVICE void store_some(T* to, const Raw<T, count>& raw, std::int64_t valid,
                            Site site = Site::here()) {
  if constexpr (aligned) store(to, raw, site);
  else store_tail(to, raw, valid);
}

}  // namespace ldit
