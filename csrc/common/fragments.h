// Matrix fragments of 16-bit numbers and of float32 alike, in the layout of mma.h: products by
// tensor cores where there are 16 bits, else by FMA, with the factors passed from lane to lane.
//
// A depth k is a number of tiles of 8, k = 8·tiles; a Word holds two neighbours along k, from
// 2·member on. What a warp holds together, and what a lane does of it:
//
//   A [16, k]    Word [2·tiles]    a[2·t] and a[2·t + 1]: rows `group` and `group` + 8, tile t
//   B [k, 8]     Word [tiles]      b[t]: column `group`, tile t
//   D [16, 8]    float [4]         two columns of row `group`, then of row `group` + 8
#pragma once

#include "mma.h"
#include "shared.h"
#include "vector.h"

namespace ldit {

// Two neighbours along k.
template <class T>
using Word = std::conditional_t<sizeof(T) == 4, float2, std::uint32_t>;

template <class T>
LDIT_DEVICE Word<T> word(float low, float high) {
  if constexpr (kIs16Bit<T>) return pack<T>(low, high);
  else return float2{low, high};
}

LDIT_DEVICE int group_index() { return lane_index() / 4; }
LDIT_DEVICE int member_index() { return lane_index() % 4; }

// Rows in shared memory, `columns` a multiple of 8. An odd number of 16-byte units from row to row
// spreads the same unit of 8 neighbouring rows over all banks: ldmatrix reads without conflicts. 72
// columns of 16 bits are 9 units as they are.
template <class T, int columns>
struct Tile {
  static constexpr int stride = (columns / kVector<T> | 1) * kVector<T>;
  static constexpr std::int64_t size(std::int64_t rows) { return rows * stride; }
  Shared<T> memory;

  LDIT_DEVICE T* at(int row, int column, int count, Site site = Site::here()) const {
    return memory.span(row * stride + column, count, site);
  }
  LDIT_DEVICE Word<T> pair(int row, int column, Site site = Site::here()) const {
    return *reinterpret_cast<const Word<T>*>(at(row, column, 2, site));
  }
  LDIT_DEVICE void set_pair(int row, int column, Word<T> pair, Site site = Site::here()) const {
    *reinterpret_cast<Word<T>*>(at(row, column, 2, site)) = pair;
  }
  // Neighbours along k lie in two rows here.
  LDIT_DEVICE Word<T> pair_down(int row, int column, Site site = Site::here()) const {
    static_assert(!kIs16Bit<T>);
    return {*at(row, column, 1, site), *at(row + 1, column, 1, site)};
  }
};

// A [16, 8·tiles] per warp: rows from `row` on, k from `column` on.
template <int tiles, class T, int columns>
LDIT_DEVICE void load_a(Word<T> (&a)[2 * tiles], const Tile<T, columns>& from, int row, int column,
                        Site site = Site::here()) {
  if constexpr (kIs16Bit<T>) {
    int i = lane_index() / 8, j = lane_index() % 8;
#pragma unroll
    for (int t = 0; t + 1 < tiles; t += 2) {
      std::uint32_t r[4];
      ldmatrix(r, from.at(row + j + 8 * (i % 2), column + 8 * t + 8 * (i / 2), 8, site), site);
#pragma unroll
      for (int w = 0; w < 4; ++w) a[2 * t + w] = r[w];
    }
    if constexpr (tiles % 2) {
      std::uint32_t r[2];
      ldmatrix(r, from.at(row + j + 8 * (i % 2), column + 8 * (tiles - 1), 8, site), site);
      a[2 * tiles - 2] = r[0], a[2 * tiles - 1] = r[1];
    }
  } else {
#pragma unroll
    for (int w = 0; w < 2 * tiles; ++w) {
      a[w] = from.pair(row + group_index() + 8 * (w % 2), column + 8 * (w / 2) + 2 * member_index(),
                       site);
    }
  }
}

// A [16, 16] per warp, of what lies with k along rows: k from `row` on, rows of A from `column` on.
template <class T, int columns>
LDIT_DEVICE void load_a_transposed(Word<T> (&a)[4], const Tile<T, columns>& from, int row,
                                   int column, Site site = Site::here()) {
  if constexpr (kIs16Bit<T>) {
    int i = lane_index() / 8, j = lane_index() % 8;
    ldmatrix<true>(a, from.at(row + j + 8 * (i / 2), column + 8 * (i % 2), 8, site), site);
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      a[w] = from.pair_down(row + 8 * (w / 2) + 2 * member_index(),
                            column + 8 * (w % 2) + group_index(), site);
    }
  }
}

// B [8·tiles, 8] per warp, transposed from how it lies: its columns are the 8 rows from `row` on,
// its k are columns from `column` on.
template <int tiles, class T, int columns>
LDIT_DEVICE void load_b(Word<T> (&b)[tiles], const Tile<T, columns>& from, int row, int column,
                        Site site = Site::here()) {
  if constexpr (kIs16Bit<T>) {
    int i = lane_index() / 8, j = lane_index() % 8;
    constexpr int fours = tiles / 4 * 4, twos = tiles / 2 * 2;
#pragma unroll
    for (int t = 0; t < fours; t += 4) {
      std::uint32_t r[4];
      ldmatrix(r, from.at(row + j, column + 8 * (t + i), 8, site), site);
#pragma unroll
      for (int w = 0; w < 4; ++w) b[t + w] = r[w];
    }
    if constexpr (fours < twos) {
      std::uint32_t r[2];
      ldmatrix(r, from.at(row + j, column + 8 * (fours + i % 2), 8, site), site);
      b[fours] = r[0], b[fours + 1] = r[1];
    }
    if constexpr (twos < tiles) {
      std::uint32_t r[1];
      ldmatrix(r, from.at(row + j, column + 8 * twos, 8, site), site);
      b[twos] = r[0];
    }
  } else {
#pragma unroll
    for (int t = 0; t < tiles; ++t)
      b[t] = from.pair(row + group_index(), column + 8 * t + 2 * member_index(), site);
  }
}

// `tiles` fragments B [16, 8] per warp, of what lies with k along rows: k from `row` on, columns
// from `column` on.
template <int tiles, class T, int columns>
LDIT_DEVICE void load_b_transposed(Word<T> (&b)[tiles][2], const Tile<T, columns>& from, int row,
                                   int column, Site site = Site::here()) {
  if constexpr (kIs16Bit<T>) {
    int i = lane_index() / 8, j = lane_index() % 8;
#pragma unroll
    for (int t = 0; t + 1 < tiles; t += 2) {
      std::uint32_t r[4];
      ldmatrix<true>(r, from.at(row + j + 8 * (i % 2), column + 8 * t + 8 * (i / 2), 8, site),
                     site);
      b[t][0] = r[0], b[t][1] = r[1], b[t + 1][0] = r[2], b[t + 1][1] = r[3];
    }
    if constexpr (tiles % 2) {
      std::uint32_t r[2];
      ldmatrix<true>(r, from.at(row + j + 8 * (i % 2), column + 8 * (tiles - 1), 8, site), site);
      b[tiles - 1][0] = r[0], b[tiles - 1][1] = r[1];
    }
  } else {
#pragma unroll
    for (int t = 0; t < tiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        b[t][half] = from.pair_down(row + 8 * half + 2 * member_index(),
                                    column + 8 * t + group_index(), site);
  }
}

namespace detail {

LDIT_DEVICE float2 from_lane(float2 pair, int lane) {
  return {__shfl_sync(kFullMask, pair.x, lane), __shfl_sync(kFullMask, pair.y, lane)};
}

// One tile deep, by FMA: the rows of A are in the lanes of a group, a column of B in those of
// another.
LDIT_DEVICE void mma_fp32_by_shuffles(float (&d)[4], float2 above, float2 below, float2 b) {
  int row = lane_index() / 4 * 4, column = lane_index() % 4 * 8;
#pragma unroll 1  // a quarter of the code, which takes long to compile
  for (int pair = 0; pair < 4; ++pair) {
    float2 a0 = from_lane(above, row + pair), a1 = from_lane(below, row + pair);
    float2 b0 = from_lane(b, column + pair), b1 = from_lane(b, column + 4 + pair);
    d[0] += a0.x * b0.x, d[0] += a0.y * b0.y;
    d[1] += a0.x * b1.x, d[1] += a0.y * b1.y;
    d[2] += a1.x * b0.x, d[2] += a1.y * b0.y;
    d[3] += a1.x * b1.x, d[3] += a1.y * b1.y;
  }
}

LDIT_DEVICE void mma_fp32(float (&d)[4], float2 above, float2 below, float2 b,
                          [[maybe_unused]] Site site = Site::here()) {
#ifdef LDIT_EMULATED
  // The same sums, in the same order, in one exchange between the lanes instead of 32
  // (tests/csrc/helpers.cu compares them).
  float2 a[2] = {above, below};
  emulated_mma<float, 8>("mma_fp32", d, a, &b, site);
#else
  mma_fp32_by_shuffles(d, above, below, b);
#endif
}

}  // namespace detail

// d [16, 8] += a [16, 8·tiles] · b [8·tiles, 8], per warp.
template <class T, int tiles>
LDIT_DEVICE void mma(float (&d)[4], const Word<T> (&a)[2 * tiles], const Word<T> (&b)[tiles],
                     Site site = Site::here()) {
  if constexpr (kIs16Bit<T>) {
#pragma unroll
    for (int t = 0; t + 1 < tiles; t += 2) {
      mma_m16n8k16<T>(d, {a[2 * t], a[2 * t + 1], a[2 * t + 2], a[2 * t + 3]}, {b[t], b[t + 1]},
                      site);
    }
    if constexpr (tiles % 2)
      mma_m16n8k8<T>(d, {a[2 * tiles - 2], a[2 * tiles - 1]}, {b[tiles - 1]}, site);
  } else {
#pragma unroll
    for (int t = 0; t < tiles; ++t) detail::mma_fp32(d, a[2 * t], a[2 * t + 1], b[t], site);
  }
}

// A [16, 16] per warp of two neighbouring D [16, 8], rounded to T.
template <class T>
LDIT_DEVICE void pack_a(Word<T> (&a)[4], const float (&first)[4], const float (&second)[4]) {
  a[0] = word<T>(first[0], first[1]), a[1] = word<T>(first[2], first[3]);
  a[2] = word<T>(second[0], second[1]), a[3] = word<T>(second[2], second[3]);
}

}  // namespace ldit
