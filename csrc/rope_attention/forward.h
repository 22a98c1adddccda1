// rope_attention, the forward kernel. For one head of one sample:
//
//   out = softmax(q·kᵀ·softmax_scale)·v,    lse_i = m_i + log2 l_i
//
// with q and k normed and rotated on load (rows.h), and the softmax computed online: see
// OnlineSoftmax. A block takes rows of queries; keys and values of the head, or as many of them as
// fit, are in shared memory.
//
// Letters: T is the dtype of qkv; width the columns of a head, padded; a warp works on m tiles of
// 16 queries and n tiles of 8 keys at a time; t counts tiles of 8 columns of a head; i the four
// floats that a lane holds of a [16, 8] fragment of D (common/mma.h): they are in row `group` +
// 8·half, half = i / 2, and in column 2·member + i % 2.
//
// A warp owns 16·m queries. Their rows stay in registers as fragments of A, and so do the scores,
// [16·m, 8·n], which are the A of the product with v. Where the head is in shared memory, a warp
// goes on to the rows 16·m·warps further down.
//
// Shared memory, K and Q rows of keys and queries (sizes.keys, sizes.queries), rows padded to
// `stride` of Tile:
//
//   queries           T [Q, width]     normed and rotated; then the rows of the result
//   keys, values      T [K, width]     k normed and rotated; v without its bias
//   shared_vectors    float [5, width] weights of the norms, bias
#pragma once

#include "rows.h"

namespace ldit {

// The shape of a warp's work.
template <class T, int width>
struct ForwardShape {
  // Tiles of 16 queries: each fragment of keys serves all.
  static constexpr int m = kIs16Bit<T> && width <= 72 ? 2 : 1;
  static constexpr int n = kIs16Bit<T> ? 8 : 4;  // tiles of 8 keys whose scores are held at a time
  static constexpr int rows = 16 * m, keys = 8 * n, tiles = width / 8;
  static constexpr int threads = 128;
};

// The state of a warp's 16·m queries after some keys, for scores s = q·kᵀ·softmax_scale_log2:
//
//   row_max [16·m]         m_i, the largest score so far; the same in the four lanes of a row
//   row_sum [16·m]         l_i = Σ_j 2^(s_ij − m_i), of each lane only over its own columns
//   acc     [16·m, width]  Σ_j 2^(s_ij − m_i)·v_j, in fragments of D (common/mma.h)
template <class T, int width>
struct OnlineSoftmax {
  using Shape = ForwardShape<T, width>;
  float row_max[Shape::m][2], row_sum[Shape::m][2];  // [16·m] per warp; index: tile, half
  float acc[Shape::m][Shape::tiles][4];              // [16·m, width] per warp

  LDIT_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < Shape::m; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) row_max[m][half] = -INFINITY, row_sum[m][half] = 0.f;
#pragma unroll
      for (int t = 0; t < Shape::tiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][t][i] = 0.f;
    }
  }

  // Takes Shape::keys keys from row `first` on, of which `remaining` exist, one at least: so
  // `row_max` is finite.
  LDIT_DEVICE void update(const Word<T> (&q)[Shape::m][2 * Shape::tiles],
                          const Tile<T, width>& keys, const Tile<T, width>& values, int first,
                          int remaining, float softmax_scale_log2) {
    float scores[Shape::m][Shape::n][4] = {};  // [16·m queries, 8·n keys] per warp; later p
#pragma unroll
    for (int n = 0; n < Shape::n; ++n) {
      Word<T> b[Shape::tiles];  // kᵀ: [width, 8 keys] per warp
      load_b(b, keys, first + 8 * n, 0);
#pragma unroll
      for (int m = 0; m < Shape::m; ++m) mma<T>(scores[m][n], q[m], b);
    }
    if (remaining < Shape::keys) mask_scores(scores, remaining);
#pragma unroll
    for (int m = 0; m < Shape::m; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) softmax_row(scores[m], m, half, softmax_scale_log2);
#pragma unroll
    for (int n = 0; n < Shape::n; n += 2) {
      Word<T> b[Shape::tiles][2];  // v: [16 keys, width] per warp
      load_b_transposed(b, values, first + 8 * n, 0);
#pragma unroll
      for (int m = 0; m < Shape::m; ++m) {
        Word<T> a[4];  // p: [16 queries, 16 keys] per warp
        pack_a<T>(a, scores[m][n], scores[m][n + 1]);
#pragma unroll
        for (int t = 0; t < Shape::tiles; ++t) mma<T>(acc[m][t], a, b[t]);
      }
    }
  }

 private:
  // Scores of keys from number `remaining` on become −∞.
  LDIT_DEVICE static void mask_scores(float (&scores)[Shape::m][Shape::n][4], int remaining) {
#pragma unroll
    for (int n = 0; n < Shape::n; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * n + 2 * member_index() + i % 2 >= remaining) {
#pragma unroll
          for (int m = 0; m < Shape::m; ++m) scores[m][n][i] = -INFINITY;
        }
  }

  // Replaces the scores of a row, in each of its four lanes, by p = 2^(s − m_i), and rescales what
  // was summed with a lower maximum.
  LDIT_DEVICE void softmax_row(float (&scores)[Shape::n][4], int m, int half,
                               float softmax_scale_log2) {
    float new_max = -INFINITY;
#pragma unroll
    for (int n = 0; n < Shape::n; ++n)
      new_max = fmaxf(new_max, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    new_max = fmaxf(row_max[m][half], warp_max(new_max, 4) * softmax_scale_log2);
    float rescale = fast_exp2(row_max[m][half] - new_max), sum = 0.f;
    row_max[m][half] = new_max;
#pragma unroll
    for (int n = 0; n < Shape::n; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = fast_exp2(scores[n][i] * softmax_scale_log2 - new_max);
        sum += scores[n][i];
      }
    row_sum[m][half] = row_sum[m][half] * rescale + sum;
#pragma unroll
    for (int t = 0; t < Shape::tiles; ++t)
      acc[m][t][2 * half] *= rescale, acc[m][t][2 * half + 1] *= rescale;
  }
};

// Divides by the row sums, adds the bias of the values and stores 16·m rows, by way of the
// rows of `own` that nobody else needs any more.
template <class T, int width, bool full_width>
LDIT_DEVICE void store_result(const OnlineSoftmax<T, width>& softmax, const Tile<T, width>& own,
                              int row, int token, T* out, float* lse,
                              const Head<width, full_width>& head, const Vectors<width>& vectors) {
  using Shape = ForwardShape<T, width>;
  __syncwarp();  // all lanes have their fragments of the queries that were here
#pragma unroll
  for (int m = 0; m < Shape::m; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row_sum = warp_sum(softmax.row_sum[m][half], 4), inverse = 1.f / row_sum;
      int down = 16 * m + 8 * half + group_index();
#pragma unroll
      for (int t = 0; t < Shape::tiles; ++t) {
        const int column = 8 * t + 2 * member_index();
        Raw<float, 2> pair;
        for (int j = 0; j < 2; ++j) pair.set(j, softmax.acc[m][t][2 * half + j] * inverse);
        pair = vectors.add_bias(pair, 2, column);
        own.set_pair(row + down, column, word<T>(pair[0], pair[1]));
      }
      if (member_index() == 0 && token + down < head.tokens) {
        lse[head.in_heads(token + down)] = softmax.row_max[m][half] + fast_log(row_sum) * kLog2E;
      }
    }
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Shape::m; ++m) {
    store_rows(own, row + 16 * m, out + head.in_flat(token + 16 * m), head.row(),
               head.tokens - token - 16 * m, head);
  }
}

// A grid of heads by samples. Blocks of a head are neighbours, so that its keys come from the L2
// cache. `queries` and `keys` of the sizes are multiples of Shape::rows and Shape::keys.
// `head_in_smem`: one block holds the head, as many queries as keys, of just this width, in aligned
// rows; else each warp takes one tile of queries.
template <class T, int width, bool head_in_smem>
__global__ void __launch_bounds__(128, 2)
    rope_attention_fwd(const T* __restrict__ qkv, QkvPrologue prologue, T* __restrict__ out,
                       float* __restrict__ lse, AttentionSizes sizes, bool aligned) {
  using Shape = ForwardShape<T, width>;
  using Rows = Tile<T, width>;
  DynamicShared dynamic;
  const Rows queries{dynamic.take<T>(Rows::size(sizes.queries))},
      keys{dynamic.take<T>(Rows::size(sizes.keys))},
      values{dynamic.take<T>(Rows::size(sizes.keys))};
  LDIT_SHARED(float, shared_vectors, Vectors<width>::size);
  const Vectors<width> vectors{shared_vectors};
  const int parts = head_in_smem ? 1 : (int(sizes.tokens) + sizes.queries - 1) / sizes.queries,
            part = blockIdx.x % parts;
  const Head<width, head_in_smem> head(sizes, blockIdx.y, blockIdx.x / parts, aligned);
  const HeadRows<T, width, head_in_smem> in{qkv, head, prologue, vectors};
  const int first = part * sizes.queries;
  // Of scores in units of log 2, so that exp is one instruction, exp2.
  const float softmax_scale_log2 = kLog2E / sqrtf(static_cast<float>(head.width));

  if (head_in_smem) stage_v(in, 0, sizes.keys, values);
  stage_norm_and_bias(prologue, head, vectors);
  __syncthreads();
  if (head_in_smem) stage_q_and_k(in, sizes.keys, queries, keys);
  else stage_q_or_k(in, 0, first, sizes.queries, queries);
  wait_copies<0>();
  __syncthreads();
  for (int row = warp_index() * Shape::rows; row < sizes.queries;
       row += blockDim.x / kWarp * Shape::rows) {
    const bool active = first + row < head.tokens;
    Word<T> q[Shape::m][2 * Shape::tiles];  // [16·m, width] per warp
#pragma unroll
    for (int m = 0; m < Shape::m; ++m) load_a<Shape::tiles>(q[m], queries, row + 16 * m, 0);
    OnlineSoftmax<T, width> softmax;
    for (int key = 0; key < (head_in_smem ? 1 : head.tokens);
         key += head_in_smem ? 1 : sizes.keys) {
      if (!head_in_smem) {
        __syncthreads();
        stage_v(in, key, sizes.keys, values);
        stage_q_or_k(in, 1, key, sizes.keys, keys);
        wait_copies<0>();
        __syncthreads();
      }
      int count = min(sizes.keys, head.tokens - key);
      for (int i = 0; active && i < count; i += Shape::keys)
        softmax.update(q, keys, values, i, count - i, softmax_scale_log2);
    }
    if (active) store_result(softmax, queries, row, first + row, out, lse, head, vectors);
  }
}

}  // namespace ldit
