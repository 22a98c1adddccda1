// The gradient of 16 rows of q or k on its way to global memory. With x the row and its bias,
// r = 1 / rms(x), x̂ = r·x, and d the gradient of rope(x̂·weight), for every row
//
//   d_y = softmax_scale·ropeᵀ(d),  d_weight += d_y·x̂,  g = d_y·weight,
//   d_x = r·(g − x̂·mean(g·x̂)),    d_bias += d_x
//
// where the sums over rows are those of one warp, in shared memory, [5, width] (see Vectors).
// A warp has the 16 rows in fragments of D, [16, width]: of each tile of 8 columns, a lane holds
// columns 2·member and 2·member + 1, in row `group` (half 0) and in row `group` + 8 (half 1).
#pragma once

#include "rows.h"

namespace ldit {

// The sum of each of 8 values over the lanes of all groups: those of group g get that of value g.
// Every step leaves a lane half of the values, so that 8 sums take 7 shuffles instead of 24.
LDIT_DEVICE float sum_for_group(float (&values)[8]) {
#pragma unroll
  for (int flip = 16; flip >= 4; flip /= 2) {
    const bool upper = lane_index() & flip;
#pragma unroll
    for (int i = 0; i < flip / 4; ++i) {
      float low = values[i], high = values[flip / 4 + i];
      values[i] = (upper ? high : low) + from_lane_across(upper ? low : high, flip);
    }
  }
  return values[0];
}

// Adds to `sums` [8·tiles], this warp's own, the sum over all groups of each column; `value(t, j)`
// is this lane's for column 2·member + j of tile t.
template <int tiles, class Value>
LDIT_DEVICE void add_columns(const Shared<float>& sums, Value&& value) {
#pragma unroll
  for (int t = 0; t < tiles; t += 4) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = t + i / 2 < tiles ? value(t + i / 2, i % 2) : 0.f;
    float sum = sum_for_group(values);
    int tile = t + group_index() / 2;
    if (tile < tiles) sums[8 * tile + 2 * member_index() + group_index() % 2] += sum;
  }
}

// d [16, width] per warp, of rows from `token` on of queries or keys (`which` 0 or 1), in place;
// adds to this warp's `sums`. The formulas are at the top.
template <class T, int width, bool full_width>
LDIT_DEVICE void norm_rope_backward(float (&d)[width / 8][4],
                                    const HeadRows<T, width, full_width>& in, int which, int token,
                                    float softmax_scale, const Vectors<width>& sums) {
  const auto& [qkv, head, prologue, vectors] = in;
  constexpr int tiles = width / 8;
  const bool normed = prologue.q_weight.data != nullptr;
  const int member = 2 * member_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int at = token + group_index() + 8 * half;
    bool in_range = at < head.tokens;
    const float* angles = prologue.table + std::int64_t(at) * head.width + member;
    bool rotated = prologue.table && in_range;
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      Raw<float, 2> angle{};
      bool here = rotated && head.valid_columns(8 * t + member, 2);
      if (here) angle = load<2>(angles + 8 * t);
      float cos = here ? angle[0] * softmax_scale : softmax_scale,
            sin = here ? angle[1] * softmax_scale : 0.f;
      float even = d[t][2 * half], odd = d[t][2 * half + 1];
      d[t][2 * half] = even * cos + odd * sin;
      d[t][2 * half + 1] = odd * cos - even * sin;
    }
    if (!normed) continue;
    const T* from = qkv + head.in_packed(which, in_range ? at : 0) + member;
    Raw<T, 2> raw[tiles];
    float squares = 0.f, mean_g_xhat = 0.f;
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      raw[t] = head.template load_some<2>(from + 8 * t,
                                          in_range ? head.valid_columns(8 * t + member, 2) : 0);
      auto pair = vectors.add_bias(raw[t], which, 8 * t + member);
      squares += pair[0] * pair[0] + pair[1] * pair[1];
    }
    float inverse = inverse_rms(squares, head, prologue);
#pragma unroll
    for (int t = 0; t < tiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float x_hat = vectors.add_bias(raw[t], which, 8 * t + member)[j] * inverse,
              &g = d[t][2 * half + j], dw = g * x_hat;
        int column = 8 * t + member + j;
#pragma unroll
        for (int flip = 4; flip < kWarp; flip *= 2) dw += from_lane_across(dw, flip);
        if (group_index() == 0) sums.weight(which)[column] += dw;
        g *= *vectors.weight_at(which, column, 1);
        mean_g_xhat += g * x_hat;
      }
    mean_g_xhat = warp_sum(mean_g_xhat, 4) / static_cast<float>(head.width);
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      auto pair = vectors.add_bias(raw[t], which, 8 * t + member);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& g = d[t][2 * half + j];
        g = (g - pair[j] * inverse * mean_g_xhat) * inverse;
      }
    }
  }
  if (prologue.bias.data != nullptr)
    add_columns<tiles>(sums.bias(which), [&](int t, int j) { return d[t][j] + d[t][2 + j]; });
}

// Rounds d [16, width] to T, into rows of shared memory that only this warp uses any more, and
// stores from there the first `exist` rows to `to`, a query, key or value of qkv.
template <class T, int width, bool full_width>
LDIT_DEVICE void store_tile(const float (&d)[width / 8][4], const Tile<T, width>& own, int row,
                            T* to, int exist, const Head<width, full_width>& head) {
  __syncwarp();
#pragma unroll
  for (int t = 0; t < width / 8; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      own.set_pair(row + group_index() + 8 * half, 8 * t + 2 * member_index(),
                   word<T>(d[t][2 * half], d[t][2 * half + 1]));
    }
  __syncwarp();
  store_rows(own, row, to, 3 * head.row(), exist, head);
}

}  // namespace ldit
