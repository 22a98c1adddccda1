// rope_attention, the backward kernel. A block computes the gradients of one head of one sample:
//
//   p  = 2^(q·kᵀ·softmax_scale_log2 − lse)    q, k normed and rotated; lse of the forward pass
//   dv = pᵀ·d_out
//   dp = d_out·vᵀ
//   ds = p∘(dp − delta)                       delta = d_out·out, summed over the columns of a row
//   dk = softmax_scale·dsᵀ·q
//   dq = softmax_scale·ds·k
//
// and then brings dq and dk back through rotation and norm (gradients.h).
//
// Letters: T is the dtype of qkv; width the columns of a head, padded; a warp works on m tiles of
// 16 keys and n tiles of 8 queries at a time; t counts tiles of 8 columns of a head; i the four
// floats that a lane holds of a [16, 8] fragment of D (common/mma.h).
//
// A warp owns the 16·m rows of `keys` and `values` from warp·16·m on, and sums their dk and dv in
// registers, [16·m, width] each. It computes p, dp and ds transposed, [16·m keys, 8·n queries], so
// that they are the A of the products with d_out and q without leaving registers. ds also goes to
// shared memory, once for `block` queries, and there a warp owns 16 queries at a time for dq =
// ds·k, over the keys of all warps. So there are five matrix products, and no sum over blocks.
//
// Where not all keys fit in shared memory, the block takes a part of them at a time, and sums dq in
// `scratch` in global memory, as it always does where heads are wider than 72.
//
// Shared memory, K and Q rows of keys and queries (sizes.keys, sizes.queries), rows padded to
// `stride` of Tile:
//
//   keys, values      T [K, width]               k normed and rotated; v without its bias
//   queries, d_out    T [Q, width]               q normed and rotated
//   ds                T [K, block]               transposed: rows are keys, columns queries
//   sums              float [warps, 5, width]    of each warp: see Vectors in rows.h
//   lse_and_delta     float [max_queries / 8, 2, 8]
//   shared_vectors    float [5, width]           weights of the norms, bias
#pragma once

#include "gradients.h"

namespace ldit {

template <class T, int width, bool head_in_smem>
struct BackwardShape {
  static constexpr int m = head_in_smem ? 2 : 1;         // tiles of 16 keys of a warp
  static constexpr int n = width <= 72 ? 4 : 2;          // tiles of 8 queries at a time
  static constexpr int block = head_in_smem ? 128 : 64;  // queries whose gradient is made at a time
  static constexpr int rows = 16 * m, tiles = width / 8;
  static constexpr int threads = 256;
  // Registers do not hold 16 rows of dq at full width beside dk and dv: it is made in two halves
  // and summed in global memory.
  static constexpr bool dq_in_scratch = width > 72;
  static constexpr int max_queries = head_in_smem ? 256 : 64;  // queries in shared memory

  using Rows = Tile<T, width>;
  using Ds = Tile<T, block>;
  using VectorSums = Vectors<width>;  // of a warp
  static std::size_t shared(const AttentionSizes& sizes) {
    std::size_t rows =
        2 * Rows::size(sizes.keys) + 2 * Rows::size(sizes.queries) + Ds::size(sizes.keys);
    return rows * sizeof(T) + 4 * sizes.warps * VectorSums::size;
  }
};

// The dynamic shared memory of a block, and lse_and_delta. See the layout above.
template <class T, int width, bool head_in_smem>
struct BackwardMemory {
  using Shape = BackwardShape<T, width, head_in_smem>;
  typename Shape::Rows keys, values, queries, d_out;
  typename Shape::Ds ds;        // dsᵀ: rows are keys, columns queries of a block
  Shared<float> lse_and_delta;  // 8 at a time: their lse, then their deltas
  Shared<float> sums;           // [warps, …]: what the gradients of the vectors sum

  LDIT_DEVICE BackwardMemory(DynamicShared& dynamic, const Shared<float>& lse_and_delta,
                             const AttentionSizes& sizes)
      : keys{dynamic.take<T>(Shape::Rows::size(sizes.keys))},
        values{dynamic.take<T>(Shape::Rows::size(sizes.keys))},
        queries{dynamic.take<T>(Shape::Rows::size(sizes.queries))},
        d_out{dynamic.take<T>(Shape::Rows::size(sizes.queries))},
        ds{dynamic.take<T>(Shape::Ds::size(sizes.keys))}, lse_and_delta(lse_and_delta),
        sums(dynamic.take<float>(sizes.warps * Shape::VectorSums::size)) {}

  LDIT_DEVICE typename Shape::VectorSums sums_of(int warp) const {
    return {sums.part(warp * Shape::VectorSums::size, Shape::VectorSums::size)};
  }
};

// The tensors [samples, tokens, heads·width] of the result and its gradient; lse [samples, heads,
// tokens], in units of log 2.
template <class T>
struct Outputs {
  const T* d_out;
  const T* out;
  const float* lse;
};

// Loads rows [first, first + rows) of d_out, four threads to a row, with the log-sum-exp of their
// queries and delta = Σ d_out·out, of out without the bias of the values, as these are in shared
// memory. Queries that do not exist get an lse of infinity, so that their p is 0.
template <class T, int width, bool head_in_smem>
LDIT_DEVICE void stage_d_out(const BackwardMemory<T, width, head_in_smem>& memory,
                             const Outputs<T>& outputs, const HeadRows<T, width, head_in_smem>& in,
                             int first, int rows) {
  const auto& head = in.head;
  for (int row = threadIdx.x / 4; row < rows; row += blockDim.x / 4) {
    int token = first + row;
    bool in_range = token < head.tokens;
    std::int64_t at = head.in_flat(in_range ? token : 0);
    float delta = 0.f;
#pragma unroll
    for (int column = kChunk * member_index(); column < width; column += 4 * kChunk) {
      int valid = in_range ? head.valid_columns(column, kChunk) : 0;
      auto d_row = head.template load_some<kChunk>(outputs.d_out + at + column, valid);
      auto out_row = head.template load_some<kChunk>(outputs.out + at + column, valid);
      store(memory.d_out.at(row, column, kChunk), d_row);
      auto without_bias = in.vectors.add_bias(out_row, 2, column, -1.f);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) delta += d_row[j] * without_bias[j];
    }
    delta = warp_sum(delta, 4);
    if (member_index() == 0) {
      const int at = 16 * (row / 8) + row % 8;
      memory.lse_and_delta[at] = in_range ? outputs.lse[head.in_heads(token)] : INFINITY;
      memory.lse_and_delta[at + 8] = delta;
    }
  }
}

// dk and dv of a warp's keys.
template <class T, int width, bool head_in_smem>
struct KeyGradients {
  using Shape = BackwardShape<T, width, head_in_smem>;
  float dk[Shape::m][Shape::tiles][4] = {};  // [16·m, width] per warp
  float dv[Shape::m][Shape::tiles][4] = {};  // [16·m, width] per warp

  // Adds what 8·n queries from `query` on give, and leaves their ds in shared memory, from `column`
  // on. Of the keys, in rows from `row` on, `remaining` exist.
  LDIT_DEVICE void add(const BackwardMemory<T, width, head_in_smem>& memory, int row, int remaining,
                       int query, int column, float softmax_scale_log2) {
    constexpr int M = Shape::m, N = Shape::n;
    float p[M][N][4] = {};  // pᵀ, later dsᵀ: [16·m keys, 8·n queries] per warp
    dot_nt<N>(p, memory.keys, row, memory.queries, query);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      // Of queries 2·member and 2·member + 1 of the tile: a lane's columns of pᵀ.
      auto lse = load<2>(memory.lse_and_delta.span(2 * (query + 8 * n) + 2 * member_index(), 2));
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          p[m][n][i] = fast_exp2(p[m][n][i] * softmax_scale_log2 - lse[i % 2]);
    }
    if (remaining < Shape::rows) mask_p(p, remaining);
#pragma unroll
    for (int n = 0; n < N; n += 2) accumulate(dv, p, n, memory.d_out, query + 8 * n);
    // Of two tiles at a time, because there are no registers for more.
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      float dp[M][2][4] = {};  // dpᵀ: [16·m keys, 16 queries] per warp
      dot_nt<2>(dp, memory.values, row, memory.d_out, query + 8 * n);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        auto deltas = load<2>(
            memory.lse_and_delta.span(2 * (query + 8 * (n + j)) + 8 + 2 * member_index(), 2));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float (&ds)[4] = p[m][n + j];  // ds = p·(dp − delta), in place
#pragma unroll
          for (int i = 0; i < 4; ++i) ds[i] *= dp[m][j][i] - deltas[i % 2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            memory.ds.set_pair(row + 16 * m + 8 * half + group_index(),
                               column + 8 * (n + j) + 2 * member_index(),
                               word<T>(ds[2 * half], ds[2 * half + 1]));
          }
        }
      }
      accumulate(dk, p, n, memory.queries, query + 8 * n);
    }
  }

 private:
  // p of keys from number `remaining` on becomes 0.
  LDIT_DEVICE static void mask_p(float (&p)[Shape::m][Shape::n][4], int remaining) {
#pragma unroll
    for (int m = 0; m < Shape::m; ++m)
#pragma unroll
      for (int n = 0; n < Shape::n; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (16 * m + 8 * (i / 2) + group_index() >= remaining) p[m][n][i] = 0.f;
  }

  // product = a·bᵀ, for 16·m rows of `a` from `row` on and 8·count rows of `b` from `query` on.
  template <int count>
  LDIT_DEVICE static void dot_nt(float (&product)[Shape::m][count][4], const Tile<T, width>& a,
                                 int row, const Tile<T, width>& b, int query) {
    constexpr int deep = 2;  // tiles of k at a time: few registers for fragments
#pragma unroll
    for (int t = 0; t + deep <= Shape::tiles; t += deep)
      dot_nt_slice<deep>(product, a, row, b, query, 8 * t);
    if constexpr (Shape::tiles % deep > 0)
      dot_nt_slice<1>(product, a, row, b, query, 8 * (Shape::tiles - 1));
  }

  template <int deep, int count>
  LDIT_DEVICE static void dot_nt_slice(float (&product)[Shape::m][count][4],
                                       const Tile<T, width>& a, int row, const Tile<T, width>& b,
                                       int query, int column) {
    Word<T> a_frag[Shape::m][2 * deep];  // [16·m, 8·deep] per warp
#pragma unroll
    for (int m = 0; m < Shape::m; ++m) load_a<deep>(a_frag[m], a, row + 16 * m, column);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      Word<T> b_frag[deep];  // [8·deep, 8] per warp
      load_b(b_frag, b, query + 8 * n, column);
#pragma unroll
      for (int m = 0; m < Shape::m; ++m) mma<T>(product[m][n], a_frag[m], b_frag);
    }
  }

  // acc += pᵀ·b, for columns 8·n to 8·n + 16 of pᵀ [keys, queries] and 16 rows of `b` from `query`
  // on.
  LDIT_DEVICE static void accumulate(float (&acc)[Shape::m][Shape::tiles][4],
                                     const float (&p)[Shape::m][Shape::n][4], int n,
                                     const Tile<T, width>& b, int query) {
    Word<T> a_frag[Shape::m][4];      // [16·m keys, 16 queries] per warp
    Word<T> b_frag[Shape::tiles][2];  // [16 queries, width] per warp
    load_b_transposed(b_frag, b, query, 0);
#pragma unroll
    for (int m = 0; m < Shape::m; ++m) {
      pack_a<T>(a_frag[m], p[m][n], p[m][n + 1]);
#pragma unroll
      for (int t = 0; t < Shape::tiles; ++t) mma<T>(acc[m][t], a_frag[m], b_frag[t]);
    }
  }
};

// dq += ds·k, of normed and rotated queries and keys: for 16 queries, which are columns [column,
// column + 16) of dsᵀ, the first `count` keys, and columns of dq from `first` on.
template <int tiles, class T, int width, bool head_in_smem>
LDIT_DEVICE void dot_ds_k(float (&dq)[tiles][4],
                          const BackwardMemory<T, width, head_in_smem>& memory, int column,
                          int count, int first) {
#pragma unroll 2  // more at a time take registers from the gradients of keys
  for (int key = 0; key < count; key += 16) {
    Word<T> a_frag[4];         // [16 queries, 16 keys] per warp
    Word<T> b_frag[tiles][2];  // [16 keys, 8·tiles] per warp
    load_a_transposed(a_frag, memory.ds, key, column);
    load_b_transposed(b_frag, memory.keys, key, first);
#pragma unroll
    for (int t = 0; t < tiles; ++t) mma<T>(dq[t], a_frag, b_frag[t]);
  }
}

// d = scratch + d, or scratch = d, for 16 rows and the columns from `first` on.
template <int tiles, int width, bool full_width>
LDIT_DEVICE void add_scratch(float (&d)[tiles][4], float* scratch,
                             const Head<width, full_width>& head, int token, int first, bool add,
                             bool keep) {
#pragma unroll
  for (int t = 0; t < tiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int at = token + group_index() + 8 * (i / 2),
          column = first + 8 * t + 2 * member_index() + i % 2;
      if (at >= head.tokens || column >= head.width) continue;
      float& sum = scratch[head.in_heads(at) * head.width + column];
      if (add) d[t][i] += sum;
      if (keep) sum = d[t][i];
    }
}

// A block of ds in shared memory, as tokens and as rows there.
struct ScoreBlock {
  int first_query;      // token of the first row of queries in shared memory
  int query_row;        // row there with which the block begins
  int queries;          // columns of the block that exist
  int first_key, keys;  // token of the first row of keys in shared memory, and rows that exist
};

// dq of the block's queries, 16 rows to a warp at a time: dq = ds·k over the keys in shared memory,
// to which scratch adds those of earlier parts. After the last keys, rows go back through rotation
// and norm to d_qkv, by way of their own rows of queries.
template <class T, int width, bool head_in_smem>
LDIT_DEVICE void finish_queries(const BackwardMemory<T, width, head_in_smem>& memory,
                                const HeadRows<T, width, head_in_smem>& in, T* d_qkv,
                                float* scratch, const ScoreBlock& block, float softmax_scale) {
  const auto& head = in.head;
  const bool last = block.first_key + block.keys >= head.tokens;
  for (int column = 16 * warp_index(); column < block.queries;
       column += 16 * (blockDim.x / kWarp)) {
    const int at = block.query_row + column, token = block.first_query + at;
    if constexpr (BackwardShape<T, width, head_in_smem>::dq_in_scratch) {
#pragma unroll 1
      for (int part = 0; part < width; part += width / 2) {
        float dq[width / 16][4] = {};  // [16 queries, width / 2] per warp
        dot_ds_k(dq, memory, column, block.keys, part);
        add_scratch(dq, scratch, head, token, part, block.first_key > 0, true);
      }
    } else {
      float dq[width / 8][4] = {};  // [16 queries, width] per warp
      dot_ds_k(dq, memory, column, block.keys, 0);
      if (scratch) add_scratch(dq, scratch, head, token, 0, block.first_key > 0, !last);
      if (!last) continue;
      norm_rope_backward(dq, in, 0, token, softmax_scale, memory.sums_of(warp_index()));
      store_tile(dq, memory.queries, at, d_qkv + head.in_packed(0, token), head.tokens - token,
                 head);
    }
  }
}

// Brings dq of all queries from scratch through rotation and norm to d_qkv, 16 rows to a warp at a
// time, by way of the first rows of its own keys in shared memory.
template <class T, int width, bool head_in_smem>
LDIT_DEVICE void finish_from_scratch(const BackwardMemory<T, width, head_in_smem>& memory,
                                     const HeadRows<T, width, head_in_smem>& in, T* d_qkv,
                                     float* scratch, float softmax_scale) {
  const auto& head = in.head;
  for (int token = 16 * warp_index(); token < head.tokens; token += 16 * (blockDim.x / kWarp)) {
    float d[width / 8][4] = {};  // [16 queries, width] per warp
    add_scratch(d, scratch, head, token, 0, true, false);
    norm_rope_backward(d, in, 0, token, softmax_scale, memory.sums_of(warp_index()));
    store_tile(d, memory.keys, 16 * warp_index(), d_qkv + head.in_packed(0, token),
               head.tokens - token, head);
  }
}

// Adds up the sums of all warps for the gradients of the vectors.
template <class T, int width, bool head_in_smem>
LDIT_DEVICE void store_sums(const BackwardMemory<T, width, head_in_smem>& memory,
                            const VectorPartials& partials, const Head<width, head_in_smem>& head,
                            const AttentionSizes& sizes) {
  using VectorSums = Vectors<width>;
  for (int i = threadIdx.x; i < VectorSums::size; i += blockDim.x) {
    const int which = i / width, column = i % width;
    float* to = which < 2 ? partials.dw_partial : partials.db_partial;
    if (to == nullptr || column >= head.width) continue;
    float sum = 0.f;
    for (int warp = 0; warp < sizes.warps; ++warp) sum += memory.sums[warp * VectorSums::size + i];
    std::int64_t at =
        which < 2 ? ((which * sizes.samples + head.sample) * sizes.heads + head.head) * head.width
                  : (std::int64_t(head.sample) * 3 + which - 2) * head.row() + head.first();
    to[at + column] = sum;
  }
}

// `keys` of the sizes is what the warps take, rows each; `queries` a multiple of 8·n, and of
// Shape::block unless it holds all. `head_in_smem`: both are the same and hold the head, which
// has just this width, in aligned rows.
template <class T, int width, bool head_in_smem>
__global__ void __launch_bounds__(256, 1)
    rope_attention_bwd(const T* __restrict__ d_out, const T* __restrict__ qkv,
                       const T* __restrict__ out, const float* __restrict__ lse,
                       QkvPrologue prologue, T* __restrict__ d_qkv, float* scratch,
                       VectorPartials partials, AttentionSizes sizes, bool aligned) {
  using Shape = BackwardShape<T, width, head_in_smem>;
  DynamicShared dynamic;
  // Static, because its address then takes no register.
  LDIT_SHARED(float, lse_and_delta, 2 * Shape::max_queries);
  const BackwardMemory<T, width, head_in_smem> memory(dynamic, lse_and_delta, sizes);
  LDIT_SHARED(float, shared_vectors, Vectors<width>::size);
  const HeadRows<T, width, head_in_smem> in{
      qkv, Head<width, head_in_smem>(sizes, blockIdx.y, blockIdx.x, aligned), prologue,
      Vectors<width>{shared_vectors}};
  const auto& head = in.head;
  // Of scores in units of log 2, so that exp is one instruction, exp2.
  const float softmax_scale_log2 = kLog2E / sqrtf(static_cast<float>(head.width));
  const int row = warp_index() * Shape::rows;  // of this warp's keys
  const Vectors<width> sums = memory.sums_of(warp_index());
  const Outputs<T> outputs{d_out, out, lse};
  stage_norm_and_bias(in.prologue, head, in.vectors);
  for (int i = lane_index(); i < sums.size; i += kWarp) sums.memory[i] = 0.f;
  __syncwarp();

  for (int key = 0; key < (head_in_smem ? 1 : head.tokens); key += head_in_smem ? 1 : sizes.keys) {
    const int count = head_in_smem ? head.tokens : min(sizes.keys, head.tokens - key);
    __syncthreads();
    stage_v(in, key, sizes.keys, memory.values);
    if (head_in_smem) stage_q_and_k(in, sizes.keys, memory.queries, memory.keys);
    else stage_q_or_k(in, 1, key, sizes.keys, memory.keys);
    KeyGradients<T, width, head_in_smem> gradients;
    for (int query = 0; query < (head_in_smem ? 1 : head.tokens);
         query += head_in_smem ? 1 : sizes.queries) {
      if (query > 0) __syncthreads();
      if (!head_in_smem) stage_q_or_k(in, 0, query, sizes.queries, memory.queries);
      stage_d_out(memory, outputs, in, query, sizes.queries);
      wait_copies<0>();
      __syncthreads();
      const int queries = head_in_smem ? head.tokens : min(sizes.queries, head.tokens - query);
      for (int block = 0; block < queries; block += Shape::block) {
        const int columns = min(Shape::block, queries - block);
        // The gradients of scores of the block before have been read.
        if (block > 0) __syncthreads();
        for (int column = 0; row < count && column < columns; column += 8 * Shape::n) {
          gradients.add(memory, row, count - row, block + column, column, softmax_scale_log2);
        }
        __syncthreads();
        finish_queries(memory, in, d_qkv, head_in_smem ? nullptr : scratch,
                       ScoreBlock{query, block, columns, key, count}, softmax_scale_log2 * kLn2);
      }
    }
    __syncthreads();  // the keys have been read by all
    if (in.prologue.bias.data != nullptr) {
      add_columns<Shape::tiles>(sums.bias(2), [&](int t, int j) {
        float sum = 0.f;
#pragma unroll
        for (int m = 0; m < Shape::m; ++m) sum += gradients.dv[m][t][j] + gradients.dv[m][t][2 + j];
        return sum;
      });
    }
#pragma unroll
    for (int m = 0; m < Shape::m; ++m) {
      const int at = row + 16 * m, token = key + at;
      if (at >= count) continue;
      store_tile(gradients.dv[m], memory.values, at, d_qkv + head.in_packed(2, token),
                 head.tokens - token, head);
      norm_rope_backward(gradients.dk[m], in, 1, token, softmax_scale_log2 * kLn2, sums);
      store_tile(gradients.dk[m], memory.keys, at, d_qkv + head.in_packed(1, token),
                 head.tokens - token, head);
    }
  }
  __syncthreads();
  if constexpr (Shape::dq_in_scratch) {
    finish_from_scratch(memory, in, d_qkv, scratch, softmax_scale_log2 * kLn2);
    __syncthreads();
  }
  store_sums(memory, partials, head, sizes);
}

}  // namespace ldit
