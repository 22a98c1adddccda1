// Loads of rows of a head from global memory into shared memory, with bias, RMS norm and RoPE
// applied on the way (the prologue), and stores of rows of results.
//
// Columns that do not exist are 0 in shared memory, and so are rows but for a bias, so that any
// product with them is finite. p is 0 where the query or the key does not exist; no other mask is
// needed.
//
// The bias of the values is not added in shared memory: each row of p sums to 1 and so takes it to
// the result as it is.
#pragma once

#include "../common/async_copy.h"
#include "../common/floats.h"
#include "../common/fragments.h"
#include "../common/math.h"
#include "../common/reduce.h"

namespace ldit {

constexpr int kChunk = 8;  // columns that a thread takes at a time
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The head that a block works on, and offsets of its rows. `full_width`: heads are `columns` wide,
// and accesses of 16 bytes are possible; else `width` of the columns exist. Little is kept, and
// offsets are computed anew: registers are for accumulators.
template <int columns, bool full_width>
struct Head {
  int sample, head;
  int tokens, heads, width;
  bool aligned;  // whether accesses of 16 bytes are possible

  LDIT_DEVICE Head(const AttentionSizes& sizes, unsigned sample, unsigned head, bool aligned)
      : sample(sample), head(head), tokens(sizes.tokens), heads(sizes.heads),
        width(full_width ? columns : int(sizes.width)), aligned(full_width || aligned) {}

  // Elements from row to row in the result; in qkv thrice that.
  LDIT_DEVICE int row() const { return heads * width; }
  LDIT_DEVICE int first() const { return head * width; }  // column in a row of the result

  // Of a token's query, key or value (`which` 0, 1 or 2) in qkv, or of its row in the result.
  LDIT_DEVICE std::int64_t in_packed(int which, int token) const {
    return ((std::int64_t(sample) * tokens + token) * 3 + which) * row() + first();
  }
  LDIT_DEVICE std::int64_t in_flat(int token) const {
    return (std::int64_t(sample) * tokens + token) * row() + first();
  }

  // Of a token in [samples, heads, tokens].
  LDIT_DEVICE std::int64_t in_heads(int token) const {
    return (std::int64_t(sample) * heads + head) * tokens + token;
  }

  // How many of `count` columns from `column` on exist.
  LDIT_DEVICE int valid_columns(int column, int count) const {
    return full_width ? (column < columns ? count : 0) : max(min(width - column, count), 0);
  }

  // `count` neighbours in a row, of which `valid` exist, as `valid_columns` says.
  template <int count, class T>
  LDIT_DEVICE Raw<T, count> load_some(const T* from, int valid, Site site = Site::here()) const {
    if (valid == 0) return Raw<T, count>{};
    if (full_width || aligned) return load<count>(from, site);
    return load_tail<count>(from, valid);
  }
};

// float [5, width] in shared memory: vectors that all rows of a head share, or the sums that become
// their gradients. Rows 0 and 1 are the weights of the norms of queries and keys, rows 2 to 4 the
// bias of queries, keys and values. What is not given, and columns that do not exist, are 0.
template <int width>
struct Vectors {
  static constexpr int size = 5 * width;
  Shared<float> memory;

  LDIT_DEVICE float* weight_at(int which, int column, int columns) const {
    return memory.span(which * width + column, columns);
  }
  LDIT_DEVICE Shared<float> weight(int which) const { return memory.part(which * width, width); }
  LDIT_DEVICE Shared<float> bias(int which) const {
    return memory.part((2 + which) * width, width);
  }

  // Neighbours in a row of queries, keys or values (`which` 0, 1 or 2) with their bias, or without
  // for a `sign` of −1.
  template <int columns, class T>
  LDIT_DEVICE Raw<float, columns> add_bias(const Raw<T, columns>& raw, int which, int column,
                                           float sign = 1.f) const {
    auto added = load<columns>(memory.span((2 + which) * width + column, columns));
    Raw<float, columns> sum;
#pragma unroll
    for (int j = 0; j < columns; ++j) sum.set(j, sign * added[j] + raw[j]);
    return sum;
  }
};

// Loads the vectors of the head; a barrier ends it.
template <int width, bool full_width>
LDIT_DEVICE void stage_norm_and_bias(const QkvPrologue& prologue,
                                     const Head<width, full_width>& head,
                                     const Vectors<width>& vectors) {
  for (int i = threadIdx.x; i < Vectors<width>::size; i += blockDim.x) {
    const int which = i / width, column = i % width;
    const Floats from = which == 0   ? prologue.q_weight
                        : which == 1 ? prologue.k_weight
                                     : prologue.bias;
    const std::int64_t at = which < 2 ? column : (which - 2) * head.row() + head.first() + column;
    vectors.memory[i] = from.data != nullptr && column < head.width ? load_float(from, at) : 0.f;
  }
}

// The rows of a head in qkv and what is applied to them: passed to everything that loads them. By
// value, and in the backward kernel the only copy, because nvcc otherwise orders the loads of
// parameters in another way.
template <class T, int width, bool full_width>
struct HeadRows {
  const T* qkv;
  Head<width, full_width> head;
  QkvPrologue prologue;
  Vectors<width> vectors;
};

// Eight columns of a row, normed and rotated, rounded once. `inverse`: of the root mean square;
// `factors`: of the norm.
template <class T>
LDIT_DEVICE Raw<T, kChunk> apply_norm_rope(const Raw<float, kChunk>& raw, bool normed,
                                           float inverse, const Raw<float, kChunk>& factors,
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

LDIT_DEVICE float sum_of_squares(const Raw<float, kChunk>& raw) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) sum += raw[j] * raw[j];
  return sum;
}

template <int width, bool full_width>
LDIT_DEVICE float inverse_rms(float squares, const Head<width, full_width>& head,
                              const QkvPrologue& prologue) {
  return fast_rsqrt(warp_sum(squares, 4) / static_cast<float>(head.width) + prologue.eps);
}

// Loads rows [first, first + rows), a multiple of 8, of queries or keys (`which` 0 or 1), normed
// and rotated, into shared memory; four threads share a row. In few registers: sums of products
// occupy most of them.
template <class T, int width, bool full_width>
LDIT_DEVICE void stage_q_or_k(const HeadRows<T, width, full_width>& in, int which, int first,
                              int rows, const Tile<T, width>& to) {
  const auto& [qkv, head, prologue, vectors] = in;
  const bool normed = prologue.q_weight.data != nullptr;
  for (int row = threadIdx.x / 4; row < rows; row += blockDim.x / 4) {
    int token = first + row;
    bool in_range = token < head.tokens;
    const T* from = qkv + head.in_packed(which, in_range ? token : 0);
    float inverse = 1.f;
    if (normed) {
      float squares = 0.f;
      for (int column = kChunk * member_index(); column < width; column += 4 * kChunk) {
        auto raw = head.template load_some<kChunk>(
            from + column, in_range ? head.valid_columns(column, kChunk) : 0);
        squares += sum_of_squares(vectors.add_bias(raw, which, column));
      }
      inverse = inverse_rms(squares, head, prologue);
    }
    for (int column = kChunk * member_index(); column < width; column += 4 * kChunk) {
      int valid = in_range ? head.valid_columns(column, kChunk) : 0;
      auto raw =
          vectors.add_bias(head.template load_some<kChunk>(from + column, valid), which, column);
      Raw<float, kChunk> angles{}, factors{};
      if (prologue.table)
        angles = head.template load_some<kChunk>(
            prologue.table + std::int64_t(token) * head.width + column, valid);
      if (normed) factors = load<kChunk>(vectors.weight_at(which, column, kChunk));
      store(to.at(row, column, kChunk),
            apply_norm_rope<T>(raw, normed, inverse, factors, prologue.table != nullptr, angles));
    }
  }
}

// The same for the first rows of queries and keys at once, which reads the table once, and loads
// all columns of a row at a time.
template <class T, int width, bool full_width>
LDIT_DEVICE void stage_q_and_k(const HeadRows<T, width, full_width>& in, int rows,
                               const Tile<T, width>& queries, const Tile<T, width>& keys) {
  const auto& [qkv, head, prologue, vectors] = in;
  constexpr int pieces = (width / kChunk + 3) / 4;
  const bool normed = prologue.q_weight.data != nullptr;
  for (int row = threadIdx.x / 4; row < rows; row += blockDim.x / 4) {
    bool in_range = row < head.tokens;
    Raw<T, kChunk> raw[2][pieces];
    Raw<float, kChunk> angles[pieces] = {};
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      int column = kChunk * (member_index() + 4 * p),
          valid = in_range ? head.valid_columns(column, kChunk) : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        raw[i][p] = head.template load_some<kChunk>(qkv + head.in_packed(i, row) + column, valid);
      if (prologue.table)
        angles[p] = head.template load_some<kChunk>(
            prologue.table + std::int64_t(row) * head.width + column, valid);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float inverse = 1.f;
      if (normed) {
        float squares = 0.f;
#pragma unroll
        for (int p = 0; p < pieces; ++p) {
          int column = kChunk * (member_index() + 4 * p);
          if (column < width) squares += sum_of_squares(vectors.add_bias(raw[i][p], i, column));
        }
        inverse = inverse_rms(squares, head, prologue);
      }
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        int column = kChunk * (member_index() + 4 * p);
        if (column >= width) continue;
        Raw<float, kChunk> factors{};
        if (normed) factors = load<kChunk>(vectors.weight_at(i, column, kChunk));
        store((i == 0 ? queries : keys).at(row, column, kChunk),
              apply_norm_rope<T>(vectors.add_bias(raw[i][p], i, column), normed, inverse, factors,
                                 prologue.table != nullptr, angles[p]));
      }
    }
  }
}

// Starts to copy the values of rows [first, first + rows); wait_copies<0>() and a barrier end it.
template <class T, int width, bool full_width>
LDIT_DEVICE void stage_v(const HeadRows<T, width, full_width>& in, int first, int rows,
                         const Tile<T, width>& to, Site site = Site::here()) {
  const auto& [qkv, head, prologue, vectors] = in;
  constexpr int count = kVector<T>, units = width / count;
  for (int i = threadIdx.x; i < rows * units; i += blockDim.x) {
    int row = i / units, column = i % units * count, token = first + row;
    int valid = token < head.tokens ? head.valid_columns(column, count) : 0;
    const T* from = qkv + head.in_packed(2, valid ? token : 0);
    if (head.aligned)
      copy16(to.at(row, column, count, site), valid ? from + column : from, valid ? 16 : 0, site);
    else store(to.at(row, column, count, site), load_tail<count>(from + column, valid), site);
  }
  commit_copies();
}

// Rows [row, row + 16) of a warp's own, from shared memory into an array whose rows lie `stride`
// apart, as far as they exist.
template <class T, int width, bool full_width>
LDIT_DEVICE void store_rows(const Tile<T, width>& from, int row, T* to, int stride, int exist,
                            const Head<width, full_width>& head, Site site = Site::here()) {
  constexpr int count = kVector<T>, units = width / count;
  // The addresses of all iterations at once would take registers from the accumulators.
#pragma unroll 1
  for (int i = lane_index(); i < 16 * units; i += kWarp) {
    int down = i / units, column = i % units * count, valid = head.valid_columns(column, count);
    if (down >= exist || valid == 0) continue;
    auto values = load<count>(from.at(row + down, column, count, site), site);
    T* address = to + std::int64_t(down) * stride + column;
    if (head.aligned) store(address, values, site);
    else store_tail(address, values, valid);
  }
}

}  // namespace ldit
