// How rows of a head come from global memory, queries and keys turned (normed, then rotated), and how they go back.
//
// Rows and columns that do not exist are 0 in shared memory: products need no masks but that of the softmax.
#pragma once

#include "../common/async_copy.h"
#include "../common/floats.h"
#include "../common/fragments.h"
#include "../common/math.h"
#include "../common/reduce.h"

namespace ldit {

constexpr int kChunk = 8;  // columns that a thread takes at a time
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Where a block works: the arrays of its head. `exact`: heads are `columns` wide, and accesses of 16 bytes are possible; else
// `width` of the columns exist. Little is kept, and offsets are made anew: registers are for sums of products.
template <int columns, bool exact>
struct Head {
  int sample, first;  // column in a row of the result
  int tokens, row;    // elements from row to row in the result; in qkv thrice that
  int width;
  bool all;           // whether accesses of 16 bytes are possible

  LDIT_DEVICE Head(const AttentionSizes& sizes, unsigned index, bool all)
      : sample(index / unsigned(sizes.heads)), tokens(sizes.tokens), width(exact ? columns : int(sizes.width)), all(exact || all) {
    row = int(sizes.heads) * width;
    first = int(index - sample * unsigned(sizes.heads)) * width;
  }

  // Of a token's query, key or value (`which` 0, 1 or 2) in qkv, or of its row in the result.
  LDIT_DEVICE std::int64_t in_packed(int which, int token) const {
    return ((std::int64_t(sample) * tokens + token) * 3 + which) * row + first;
  }
  LDIT_DEVICE std::int64_t in_flat(int token) const { return (std::int64_t(sample) * tokens + token) * row + first; }

  // Of a token in [samples, heads, tokens].
  LDIT_DEVICE std::int64_t in_heads(int token) const {
    return (std::int64_t(sample) * (row / width) + first / width) * tokens + token;
  }

  // How many of `count` columns from `column` on exist.
  LDIT_DEVICE int left(int column, int count) const {
    return exact ? (column < columns ? count : 0) : max(min(width - column, count), 0);
  }

  // `count` neighbours in a row, of which `valid` exist, as `left` has told.
  template <int count, class T>
  LDIT_DEVICE Raw<T, count> load_some(const T* from, int valid, Site site = Site::here()) const {
    if (valid == 0) return Raw<T, count>{};
    if (exact || all) return load<count>(from, site);
    return load_tail<count>(from, valid);
  }
};

// The weights of the norms as float32 in shared memory, [2, width]; columns that do not exist have 0.
template <int width, bool exact>
LDIT_DEVICE void stage_weights(const Turn& turn, const Head<width, exact>& head, const Shared<float>& weights) {
  if (turn.q_weight.data == nullptr) return;
  for (int i = threadIdx.x; i < 2 * width; i += blockDim.x) {
    int column = i % width;
    if (column >= head.width) weights[i] = 0.f;
    else if (i < width) weights[i] = load_float(turn.q_weight, column);
    else weights[i] = load_float(turn.k_weight, column);
  }
}

// Eight columns of a turned row, rounded once. `inverse`: of the root mean square; `factors`: of the norm.
template <class T>
LDIT_DEVICE Raw<T, kChunk> turned(const Raw<T, kChunk>& raw, bool normed, float inverse, const Raw<float, kChunk>& factors,
                                  bool rotated, const Raw<float, kChunk>& angles) {
  float values[kChunk];
#pragma unroll
  for (int j = 0; j < kChunk; ++j) values[j] = normed ? raw[j] * inverse * factors[j] : raw[j];
  Raw<T, kChunk> result;
#pragma unroll
  for (int j = 0; j < kChunk; j += 2) {
    float cos = rotated ? angles[j] : 1.f, sin = rotated ? angles[j + 1] : 0.f;
    result.set(j, values[j] * cos - values[j + 1] * sin);
    result.set(j + 1, values[j + 1] * cos + values[j] * sin);
  }
  return result;
}

template <class T>
LDIT_DEVICE float sum_of_squares(const Raw<T, kChunk>& raw) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) sum += raw[j] * raw[j];
  return sum;
}

template <int width, bool exact>
LDIT_DEVICE float inverse_rms(float squares, const Head<width, exact>& head, const Turn& turn) {
  return fast_rsqrt(warp_sum(squares, 4) / static_cast<float>(head.width) + turn.eps);
}

// Turns rows [first, first + rows), a multiple of 8, of queries or keys (`which` 0 or 1) into shared memory; four threads
// share a row. In few registers: sums of products occupy most of them.
template <class T, int width, bool exact>
LDIT_DEVICE void stage_turned(const T* qkv, const Head<width, exact>& head, const Turn& turn, const Shared<float>& weights,
                              int which, int first, int rows, const Tile<T, width>& to) {
  const bool normed = turn.q_weight.data != nullptr;
  for (int row = threadIdx.x / 4; row < rows; row += blockDim.x / 4) {
    int token = first + row;
    bool there = token < head.tokens;
    const T* from = qkv + head.in_packed(which, there ? token : 0);
    float inverse = 1.f;
    if (normed) {
      float squares = 0.f;
      for (int column = kChunk * member_index(); column < width; column += 4 * kChunk) {
        squares += sum_of_squares(head.template load_some<kChunk>(from + column, there ? head.left(column, kChunk) : 0));
      }
      inverse = inverse_rms(squares, head, turn);
    }
    for (int column = kChunk * member_index(); column < width; column += 4 * kChunk) {
      int valid = there ? head.left(column, kChunk) : 0;
      auto raw = head.template load_some<kChunk>(from + column, valid);
      Raw<float, kChunk> angles{}, factors{};
      if (turn.table) angles = head.template load_some<kChunk>(turn.table + std::int64_t(token) * head.width + column, valid);
      if (normed) factors = load<kChunk>(weights.span(which * width + column, kChunk));
      store(to.at(row, column, kChunk), turned(raw, normed, inverse, factors, turn.table != nullptr, angles));
    }
  }
}

// The same for the first rows of queries and keys at once, which reads the table once, and asks for a whole row at a time.
template <class T, int width, bool exact>
LDIT_DEVICE void stage_both(const T* qkv, const Head<width, exact>& head, const Turn& turn, const Shared<float>& weights,
                            int rows, const Tile<T, width>& queries, const Tile<T, width>& keys) {
  constexpr int pieces = (width / kChunk + 3) / 4;
  const bool normed = turn.q_weight.data != nullptr;
  for (int row = threadIdx.x / 4; row < rows; row += blockDim.x / 4) {
    bool there = row < head.tokens;
    Raw<T, kChunk> raw[2][pieces];
    Raw<float, kChunk> angles[pieces] = {};
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      int column = kChunk * (member_index() + 4 * p), valid = there ? head.left(column, kChunk) : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) raw[i][p] = head.template load_some<kChunk>(qkv + head.in_packed(i, row) + column, valid);
      if (turn.table) angles[p] = head.template load_some<kChunk>(turn.table + std::int64_t(row) * head.width + column, valid);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float inverse = 1.f;
      if (normed) {
        float squares = 0.f;
#pragma unroll
        for (int p = 0; p < pieces; ++p) squares += sum_of_squares(raw[i][p]);
        inverse = inverse_rms(squares, head, turn);
      }
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        int column = kChunk * (member_index() + 4 * p);
        if (column >= width) continue;
        Raw<float, kChunk> factors{};
        if (normed) factors = load<kChunk>(weights.span(i * width + column, kChunk));
        store((i == 0 ? queries : keys).at(row, column, kChunk),
              turned(raw[i][p], normed, inverse, factors, turn.table != nullptr, angles[p]));
      }
    }
  }
}

// Starts to copy the values of rows [first, first + rows); wait_copies<0>() and a barrier end it.
template <class T, int width, bool exact>
LDIT_DEVICE void stage_values(const T* qkv, const Head<width, exact>& head, int first, int rows, const Tile<T, width>& to, Site site = Site::here()) {
  constexpr int count = kVector<T>, units = width / count;
  for (int i = threadIdx.x; i < rows * units; i += blockDim.x) {
    int row = i / units, column = i % units * count, token = first + row;
    int valid = token < head.tokens ? head.left(column, count) : 0;
    const T* from = qkv + head.in_packed(2, valid ? token : 0);
    if (head.all) copy16(to.at(row, column, count, site), valid ? from + column : from, valid ? 16 : 0, site);
    else store(to.at(row, column, count, site), load_tail<count>(from + column, valid), site);
  }
  commit_copies();
}

// Rows [row, row + 16) of a warp's own, from shared memory into an array whose rows lie `stride` apart, as far as they exist.
template <class T, int width, bool exact>
LDIT_DEVICE void store_rows(const Tile<T, width>& from, int row, T* to, int stride, int exist, const Head<width, exact>& head, Site site = Site::here()) {
  constexpr int count = kVector<T>, units = width / count;
#pragma unroll 1  // the addresses of all turns at once would take registers from sums of products
  for (int i = lane_index(); i < 16 * units; i += kWarp) {
    int down = i / units, column = i % units * count, valid = head.left(column, count);
    if (down >= exist || valid == 0) continue;
    auto values = load<count>(from.at(row + down, column, count, site), site);
    T* address = to + std::int64_t(down) * stride + column;
    if (head.all) store(address, values, site);
    else store_tail(address, values, valid);
  }
}

}  // namespace ldit
