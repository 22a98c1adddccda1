// The backward kernel: a block takes a head, and each warp some of its keys, whose gradients it sums in registers. Scores
// stand transposed, keys by queries, so that weights and their gradients multiply the queries' rows from registers; they
// go to shared memory once, from where all warps together make the gradient of a block of queries: five matrix products,
// and no sum over blocks.
//
// Where not all keys fit in shared memory, the block takes them in turns, and sums the gradient of the queries in `scratch`.
#pragma once

#include "rows.h"

namespace ldit {

template <class T, int width, bool whole>
struct BackwardShape {
  static constexpr int m = whole ? 2 : 1;  // tiles of 16 keys of a warp
  static constexpr int n = width <= 72 ? 4 : 2;  // tiles of 8 queries at a time
  static constexpr int block = whole ? 128 : 64;  // queries whose gradient is made at a time
  static constexpr int rows = 16 * m, tiles = width / 8;
  static constexpr int threads = 256;

  using Rows = Tile<T, width>;
  using Scores = Tile<T, block>;
  static std::size_t shared(const AttentionSizes& sizes) {
    std::size_t rows = 2 * Rows::size(sizes.keys) + 2 * Rows::size(sizes.queries) + Scores::size(sizes.keys);
    return rows * sizeof(T) + 4 * (2 * sizes.queries + sizes.warps * 2 * width);
  }
};

// What all warps share.
template <class T, int width, bool whole>
struct BackwardMemory {
  using Shape = BackwardShape<T, width, whole>;
  typename Shape::Rows keys, values, queries, upstream;
  typename Shape::Scores d_scores;  // rows are keys, columns queries of a block
  Shared<float> lse, deltas;        // of the queries
  Shared<float> weight_sums;        // [warps, 2, width]: what the gradients of the weights sum

  LDIT_DEVICE BackwardMemory(DynamicShared& dynamic, const AttentionSizes& sizes)
      : keys{dynamic.take<T>(Shape::Rows::size(sizes.keys))}, values{dynamic.take<T>(Shape::Rows::size(sizes.keys))},
        queries{dynamic.take<T>(Shape::Rows::size(sizes.queries))}, upstream{dynamic.take<T>(Shape::Rows::size(sizes.queries))},
        d_scores{dynamic.take<T>(Shape::Scores::size(sizes.keys))}, lse(dynamic.take<float>(sizes.queries)),
        deltas(dynamic.take<float>(sizes.queries)), weight_sums(dynamic.take<float>(sizes.warps * 2 * width)) {}
};

// Rows [first, first + rows) of the upstream gradient, with the log-sum-exp of their queries and delta = Σ upstream·result.
// Queries that do not exist get an infinite sum: their weights are 0.
template <class T, int width, bool whole>
LDIT_DEVICE void stage_upstream(const BackwardMemory<T, width, whole>& memory, const T* d_out, const T* out, const float* lse,
                                const Head<width, whole>& head, int first, int rows) {
  for (int row = threadIdx.x / 4; row < rows; row += blockDim.x / 4) {
    int token = first + row;
    bool there = token < head.tokens;
    std::int64_t at = head.in_flat(there ? token : 0);
    float delta = 0.f;
#pragma unroll
    for (int column = kChunk * member_index(); column < width; column += 4 * kChunk) {
      int valid = there ? head.left(column, kChunk) : 0;
      auto upstream = head.template load_some<kChunk>(d_out + at + column, valid);
      auto result = head.template load_some<kChunk>(out + at + column, valid);
      store(memory.upstream.at(row, column, kChunk), upstream);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) delta += upstream[j] * result[j];
    }
    delta = warp_sum(delta, 4);
    if (member_index() == 0) {
      memory.lse[row] = there ? lse[head.in_heads(token)] : INFINITY;
      memory.deltas[row] = delta;
    }
  }
}

// Takes the gradient of 16 turned rows from `token` on, queries or keys (`which` 0 or 1), back through rotation and norm.
// `sums`, of this warp and [2, width]: where the gradients of the norms' weights are summed.
template <class T, int width, bool exact>
LDIT_DEVICE void turn_back(float (&d)[width / 8][4], const T* qkv, const Head<width, exact>& head, const Turn& turn,
                           const Shared<float>& weights, int which, int token, float scale, const Shared<float>& sums) {
  constexpr int tiles = width / 8;
  const bool normed = turn.q_weight.data != nullptr;
  const int member = 2 * member_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int at = token + group_index() + 8 * half;
    bool there = at < head.tokens;
    const float* angles = turn.table + std::int64_t(at) * head.width + member;
    bool turned = turn.table && there;
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      Raw<float, 2> angle{};
      bool here = turned && head.left(8 * t + member, 2);
      if (here) angle = load<2>(angles + 8 * t);
      float cos = here ? angle[0] * scale : scale, sin = here ? angle[1] * scale : 0.f;
      float even = d[t][2 * half], odd = d[t][2 * half + 1];
      d[t][2 * half] = even * cos + odd * sin;
      d[t][2 * half + 1] = odd * cos - even * sin;
    }
    if (!normed) continue;
    const T* from = qkv + head.in_packed(which, there ? at : 0) + member;
    Raw<T, 2> raw[tiles];
    float squares = 0.f, along = 0.f;
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      raw[t] = head.template load_some<2>(from + 8 * t, there ? head.left(8 * t + member, 2) : 0);
      squares += raw[t][0] * raw[t][0] + raw[t][1] * raw[t][1];
    }
    float inverse = inverse_rms(squares, head, turn);
#pragma unroll
    for (int t = 0; t < tiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float normed = raw[t][j] * inverse, &mine = d[t][2 * half + j], of_weight = mine * normed;
        int column = which * width + 8 * t + member + j;
#pragma unroll
        for (int flip = 4; flip < kWarp; flip *= 2) of_weight += from_lane_across(of_weight, flip);
        if (group_index() == 0) sums[column] += of_weight;
        mine *= weights[column];
        along += mine * normed;
      }
    along = warp_sum(along, 4) / static_cast<float>(head.width);
#pragma unroll
    for (int t = 0; t < tiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& mine = d[t][2 * half + j];
        mine = (mine - raw[t][j] * inverse * along) * inverse;
      }
  }
}

// Rounds 16 rows to T, into rows of shared memory that only this warp uses any more, and from there to `to`.
template <class T, int width, bool exact>
LDIT_DEVICE void store_tile(const float (&d)[width / 8][4], const Tile<T, width>& own, int row, T* to, int exist, const Head<width, exact>& head) {
  __syncwarp();
#pragma unroll
  for (int t = 0; t < width / 8; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      own.set_pair(row + group_index() + 8 * half, 8 * t + 2 * member_index(), word<T>(d[t][2 * half], d[t][2 * half + 1]));
    }
  __syncwarp();
  store_rows(own, row, to, 3 * head.row, exist, head);
}

// The gradients of a warp's keys and values.
template <class T, int width, bool whole>
struct KeyGradients {
  using Shape = BackwardShape<T, width, whole>;
  float keys[Shape::m][Shape::tiles][4] = {}, values[Shape::m][Shape::tiles][4] = {};

  // Adds what 8·n queries from `query` on give, and leaves the gradients of their scores in shared memory, from `column` on. Of
  // the keys, in rows from `row` on, `left` exist.
  LDIT_DEVICE void add(const BackwardMemory<T, width, whole>& memory, int row, int left, int query, int column, float scale) {
    constexpr int M = Shape::m, N = Shape::n;
    float weights[M][N][4] = {};
    multiply_rows<N>(weights, memory.keys, row, memory.queries, query);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      auto sums = load<2>(memory.lse.span(query + 8 * n + 2 * member_index(), 2));
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[m][n][i] = fast_exp2(weights[m][n][i] * scale - sums[i % 2]);
    }
    if (left < Shape::rows) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (16 * m + 8 * (i / 2) + group_index() >= left) weights[m][n][i] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) accumulate(values, weights, n, memory.upstream, query + 8 * n);
    // Of two tiles at a time, because there are no registers for more.
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      float d_weights[M][2][4] = {};
      multiply_rows<2>(d_weights, memory.values, row, memory.upstream, query + 8 * n);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        auto deltas = load<2>(memory.deltas.span(query + 8 * (n + j) + 2 * member_index(), 2));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float(&mine)[4] = weights[m][n + j];
#pragma unroll
          for (int i = 0; i < 4; ++i) mine[i] *= d_weights[m][j][i] - deltas[i % 2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            memory.d_scores.set_pair(row + 16 * m + 8 * half + group_index(), column + 8 * (n + j) + 2 * member_index(),
                                     word<T>(mine[2 * half], mine[2 * half + 1]));
          }
        }
      }
      accumulate(keys, weights, n, memory.queries, query + 8 * n);
    }
  }

 private:
  // product = rows of `a` from `row` on, times 8·count of `b` from `query` on, transposed.
  template <int count>
  LDIT_DEVICE static void multiply_rows(float (&product)[Shape::m][count][4], const Tile<T, width>& a, int row,
                                        const Tile<T, width>& b, int query) {
    constexpr int deep = 2;  // tiles of k at a time: few registers for fragments
#pragma unroll
    for (int t = 0; t + deep <= Shape::tiles; t += deep) multiply_part<deep>(product, a, row, b, query, 8 * t);
    if constexpr (Shape::tiles % deep > 0) multiply_part<1>(product, a, row, b, query, 8 * (Shape::tiles - 1));
  }

  template <int deep, int count>
  LDIT_DEVICE static void multiply_part(float (&product)[Shape::m][count][4], const Tile<T, width>& a, int row,
                                        const Tile<T, width>& b, int query, int column) {
    Word<T> left[Shape::m][2 * deep];
#pragma unroll
    for (int m = 0; m < Shape::m; ++m) load_a<deep>(left[m], a, row + 16 * m, column);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      Word<T> right[deep];
      load_b(right, b, query + 8 * n, column);
#pragma unroll
      for (int m = 0; m < Shape::m; ++m) multiply<T>(product[m][n], left[m], right);
    }
  }

  // sums += columns 8·n to 8·n + 16 of weights [keys, queries] · rows of `b` from `query` on.
  LDIT_DEVICE static void accumulate(float (&sums)[Shape::m][Shape::tiles][4], const float (&weights)[Shape::m][Shape::n][4], int n,
                                     const Tile<T, width>& b, int query) {
    Word<T> left[Shape::m][4], right[Shape::tiles][2];
    load_b_transposed(right, b, query, 0);
#pragma unroll
    for (int m = 0; m < Shape::m; ++m) {
      as_a<T>(left[m], weights[m][n], weights[m][n + 1]);
#pragma unroll
      for (int t = 0; t < Shape::tiles; ++t) multiply<T>(sums[m][t], left[m], right[t]);
    }
  }
};

// The gradient of 16 turned queries, columns [column, column + 16) of the d_scores, from the first `count` keys.
template <class T, int width, bool whole>
LDIT_DEVICE void query_gradients(float (&d)[width / 8][4], const BackwardMemory<T, width, whole>& memory, int column, int count) {
  for (int key = 0; key < count; key += 16) {
    Word<T> left[4], right[width / 8][2];
    load_a_transposed(left, memory.d_scores, key, column);
    load_b_transposed(right, memory.keys, key, 0);
#pragma unroll
    for (int t = 0; t < width / 8; ++t) multiply<T>(d[t], left, right[t]);
  }
}

// d = scratch + d, or scratch = d, for the 16 rows of a fragment; each thread meets its own elements again.
template <int width, bool exact>
LDIT_DEVICE void add_scratch(float (&d)[width / 8][4], float* scratch, const Head<width, exact>& head, int token, bool add, bool keep) {
#pragma unroll
  for (int t = 0; t < width / 8; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int at = token + group_index() + 8 * (i / 2), column = 8 * t + 2 * member_index() + i % 2;
      if (at >= head.tokens || column >= head.width) continue;
      float& sum = scratch[head.in_heads(at) * head.width + column];
      if (add) d[t][i] += sum;
      if (keep) sum = d[t][i];
    }
}

// The gradients of a block's queries, d_scores being those of `count` keys, from `key` on; `end` and `block` are rows in memory.
template <class T, int width, bool whole>
LDIT_DEVICE void finish_queries(const BackwardMemory<T, width, whole>& memory, const T* qkv, const Head<width, whole>& head, const Turn& turn,
                                const Shared<float>& weights, const Shared<float>& sums, T* d_qkv, float* scratch, int first,
                                int block, int end, int key, int count, float scale) {
  const bool last = key + count >= head.tokens;
  for (int at = block + 16 * warp_index(); at < end; at += 16 * (blockDim.x / kWarp)) {
    const int token = first + at;
    float d[width / 8][4] = {};
    query_gradients(d, memory, at - block, count);
    if (scratch) add_scratch(d, scratch, head, token, key > 0, !last);
    if (!last) continue;
    turn_back(d, qkv, head, turn, weights, 0, token, scale, sums);
    store_tile(d, memory.queries, at, d_qkv + head.in_packed(0, token), head.tokens - token, head);
  }
}

// Adds up the sums of all warps for the gradients of the norms' weights.
template <class T, int width, bool whole>
LDIT_DEVICE void store_partials(const BackwardMemory<T, width, whole>& memory, float* partials, const Head<width, whole>& head,
                                const AttentionSizes& sizes) {
  for (int i = threadIdx.x; i < 2 * width; i += blockDim.x) {
    int which = i / width, column = i % width;
    if (column >= head.width) continue;
    float sum = 0.f;
    for (int warp = 0; warp < sizes.warps; ++warp) sum += memory.weight_sums[2 * warp * width + i];
    partials[(which * sizes.samples * sizes.heads + blockIdx.x) * head.width + column] = sum;
  }
}

// `keys` of the sizes is what the warps take, rows each; `queries` a multiple of 8·n, and of Shape::block unless it holds all.
// `whole`: both are the same and hold the head, which has just this width, and accesses are whole.
template <class T, int width, bool whole>
__global__ void __launch_bounds__(256, 1)
    rope_attention_bwd(const T* __restrict__ d_out, const T* __restrict__ qkv, const T* __restrict__ out, const float* __restrict__ lse,
                       Turn turn, T* __restrict__ d_qkv, float* scratch, float* __restrict__ partials, AttentionSizes sizes, bool all) {
  using Shape = BackwardShape<T, width, whole>;
  DynamicShared dynamic;
  const BackwardMemory<T, width, whole> memory(dynamic, sizes);
  const Head<width, whole> head(sizes, blockIdx.x, all);
  const float scale = kLog2E / sqrtf(static_cast<float>(head.width));
  const int row = warp_index() * Shape::rows;  // of this warp's keys
  const Shared<float> sums = memory.weight_sums.part(warp_index() * 2 * width, 2 * width);
  LDIT_SHARED(float, weights, 2 * width);
  stage_weights(turn, head, weights);
  for (int i = lane_index(); i < 2 * width; i += kWarp) sums[i] = 0.f;
  __syncwarp();

  for (int key = 0; key < (whole ? 1 : head.tokens); key += sizes.keys) {
    const int count = min(sizes.keys, head.tokens - key);
    __syncthreads();
    stage_values(qkv, head, key, sizes.keys, memory.values);
    if (whole) stage_both(qkv, head, turn, weights, sizes.keys, memory.queries, memory.keys);
    else stage_turned(qkv, head, turn, weights, 1, key, sizes.keys, memory.keys);
    KeyGradients<T, width, whole> gradients;
    for (int query = 0; query < (whole ? 1 : head.tokens); query += sizes.queries) {
      if (query > 0) __syncthreads();
      if (!whole) stage_turned(qkv, head, turn, weights, 0, query, sizes.queries, memory.queries);
      stage_upstream(memory, d_out, out, lse, head, query, sizes.queries);
      wait_copies<0>();
      __syncthreads();
      const int queries = min(sizes.queries, head.tokens - query);
      for (int block = 0; block < queries; block += Shape::block) {
        const int end = min(block + Shape::block, queries);
        if (block > 0) __syncthreads();  // the gradients of scores of the block before have been read
        for (int at = block; row < count && at < end; at += 8 * Shape::n) {
          gradients.add(memory, row, count - row, at, at - block, scale);
        }
        __syncthreads();
        finish_queries(memory, qkv, head, turn, weights, sums, d_qkv, whole ? nullptr : scratch, query, block, end, key, count, scale * kLn2);
      }
    }
    __syncthreads();  // the keys have been read by all
#pragma unroll
    for (int m = 0; m < Shape::m; ++m) {
      const int at = row + 16 * m, token = key + at;
      if (at >= count) continue;
      store_tile(gradients.values[m], memory.values, at, d_qkv + head.in_packed(2, token), head.tokens - token, head);
      turn_back(gradients.keys[m], qkv, head, turn, weights, 1, token, scale * kLn2, sums);
      store_tile(gradients.keys[m], memory.keys, at, d_qkv + head.in_packed(1, token), head.tokens - token, head);
    }
  }
  if (partials == nullptr) return;
  __syncthreads();
  store_partials(memory, partials, head, sizes);
}

}  // namespace ldit
