// gated_residual_adaln_rms_norm: x' = x + gate·(branch + bias), y = x̂'·gain + shift, with x̂' =
// x' / rms(x') and gain = weight·(1 + scale). Backward, d_x being the gradient of x', with r = 1
// / rms(x'), g = d_y·gain, and means over the columns:
//
//   d_x = d_x_new + r·g − x'·r³·mean(g·x'),    d_branch = gate·d_x
//   d_gate = Σ d_x·(branch + bias)          over tokens; d_bias = Σ gate·Σ d_x over samples too
//
// The gradients of weight, scale and shift are those of adaln_rms_norm.
//
//   x, x_new (x'), d_x, d_x_new       X [samples, tokens, width]; X is Y or float
//   branch, d_branch, y, d_y          Y [samples, tokens, width]
//   weight, bias; gate, scale, shift  [width]; [samples, width], in float32 or 16 bits
//   partials                          float [samples, chunks, 3 or 4, width]: see PartialSum
//
// Each pass reads and writes every token once. common/norm.h says what a block and a thread own.
#include "common/norm.h"

namespace ldit {
namespace {

// Tokens in flight in each thread: 64 to 128 bytes of x and branch forward, as much or more of four
// arrays backward.
constexpr int kRowsForward = 2;
template <class X, bool aligned>
constexpr int kRowsBackward = sizeof(X) == 2 && aligned ? 2 : 1;

template <bool aligned>
LDIT_DEVICE void load_gate(const Residual& residual, const Part& part, float (&gate)[kColumns]) {
  load_floats<aligned>(residual.gate.array, part.sample * residual.gate.stride + part.column,
                       part.valid, gate);
}

// The gate in shared memory: float [2, kNormThreads, 4], so that half of a thread's columns lies
// beside that of its neighbour, and a warp writes and reads without bank conflicts.
template <bool aligned>
LDIT_DEVICE void keep_gate(const Residual& residual, const Part& part, const Shared<float>& gates) {
  float gate[kColumns];
  load_gate<aligned>(residual, part, gate);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Raw<float, kColumns / 2> raw;
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) raw.set(j, gate[half * kColumns / 2 + j]);
    store(gates.span((half * kNormThreads + threadIdx.x) * (kColumns / 2), kColumns / 2), raw);
  }
}

LDIT_DEVICE Raw<float, kColumns> kept_gate(const Shared<float>& gates) {
  Raw<float, kColumns> gate;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    gate.pieces[half] =
        load<kColumns / 2>(
            gates.span((half * kNormThreads + threadIdx.x) * (kColumns / 2), kColumns / 2))
            .pieces[0];
  }
  return gate;
}

template <class X, class Y, bool aligned>
__global__ void __launch_bounds__(kNormThreads)
    gated_residual_adaln_rms_norm_fwd(const X* __restrict__ x, const Y* __restrict__ branch,
                                      Residual residual, Modulation modulation,
                                      X* __restrict__ x_new, Y* __restrict__ y, NormSizes sizes) {
  constexpr int steps = kRowsForward;
  using Sums = BlockSums<steps>;
  LDIT_SHARED(float, memory, Sums::size);
  const Sums sums(memory);
  const Part part(sizes);
  float gate[kColumns], bias[kColumns], gain[kColumns], shift[kColumns];
  load_gate<aligned>(residual, part, gate);
  load_floats<aligned>(residual.bias, part.column, part.valid, bias);
  load_gain<aligned>(modulation, part, gain);
  load_shift<aligned>(modulation, part, shift);
  int round = 0;
  for (std::int64_t token = part.begin; token < part.end; token += steps, round ^= 1) {
    Raw<X, kColumns> rows[steps];
    Raw<Y, kColumns> added[steps];
    float squares[steps];
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      rows[i] = load_columns<aligned>(x, sizes, part, token + i);
      added[i] = load_columns<aligned>(branch, sizes, part, token + i);
    }
#pragma unroll
    for (int i = 0; i < steps; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        rows[i].set(j, rows[i][j] + gate[j] * (added[i][j] + bias[j]));
      squares[i] = sum_of_squares(rows[i]);  // of x' as it is returned, rounded
      if (part.has(token + i))
        store_some<aligned>(x_new + part.offset(sizes, token + i), rows[i], part.valid);
    }
    sums(squares, round);
    store_modulated<aligned>(y, rows, squares, gain, shift, sizes, part, token);
  }
}

// The gradient of the norm joins that of x': d_x; then d_branch = gate·d_x.
template <class X, class Y, bool aligned>
__global__ void __launch_bounds__(kNormThreads)
    gated_residual_adaln_rms_norm_bwd(const X* __restrict__ x_new, const Y* __restrict__ branch,
                                      Residual residual, Modulation modulation,
                                      const X* __restrict__ d_x_new, const Y* __restrict__ d_y,
                                      X* __restrict__ d_x, Y* __restrict__ d_branch,
                                      float* __restrict__ partials, int num_sums, NormSizes sizes) {
  constexpr int steps = kRowsBackward<X, aligned>;
  using Sums = BlockSums<2 * steps>;
  LDIT_SHARED(float, memory, Sums::size);
  // Each thread keeps the gate of its columns here: there are not enough registers.
  LDIT_SHARED(float, gates, kMaxNormWidth);
  const Sums sums(memory);
  const Part part(sizes);
  float gain[kColumns];
  float sum_dy[kColumns] = {}, sum_dy_xhat[kColumns] = {};
  float sum_dx_branch[kColumns] = {}, sum_dx[kColumns] = {};
  keep_gate<aligned>(residual, part, gates);
  load_gain<aligned>(modulation, part, gain);
  int round = 0;
  for (std::int64_t token = part.begin; token < part.end; token += steps, round ^= 1) {
    Raw<X, kColumns> rows[steps], stream[steps];
    Raw<Y, kColumns> upstream[steps], added[steps];
    float both[2 * steps];  // Σx'² and Σg·x' of each row
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      rows[i] = load_columns<aligned>(x_new, sizes, part, token + i);
      upstream[i] = load_if_given<aligned>(d_y, sizes, part, token + i);
      stream[i] = load_if_given<aligned>(d_x_new, sizes, part, token + i);
      added[i] = load_if_given<aligned>(branch, sizes, part, token + i);
    }
#pragma unroll
    for (int i = 0; i < steps; ++i)
      sums_of_row(rows[i], upstream[i], gain, both[2 * i], both[2 * i + 1]);
    sums(both, round);
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      if (!part.has(token + i)) continue;
      const auto [r, projection] = RowGradient(both[2 * i], both[2 * i + 1], sizes);
      Raw<float, kColumns> gate = kept_gate(gates);
      Raw<X, kColumns> d_x_row;
      Raw<Y, kColumns> d_branch_row;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float dy = upstream[i][j], value = rows[i][j];
        float dx = stream[i][j] + r * dy * gain[j] - value * projection;
        d_x_row.set(j, dx);
        d_branch_row.set(j, gate[j] * dx);
        sum_dy[j] += dy;
        sum_dy_xhat[j] += dy * value * r;
        sum_dx_branch[j] += dx * added[i][j];
        sum_dx[j] += dx;
      }
      store_some<aligned>(d_x + part.offset(sizes, token + i), d_x_row, part.valid);
      store_some<aligned>(d_branch + part.offset(sizes, token + i), d_branch_row, part.valid);
    }
  }
  if (partials != nullptr) {
    store_partial<aligned>(partials, num_sums, kSumDy, sizes, part, sum_dy);
    store_partial<aligned>(partials, num_sums, kSumDyXhat, sizes, part, sum_dy_xhat);
    store_partial<aligned>(partials, num_sums, kSumDxBranch, sizes, part, sum_dx_branch);
    if (num_sums > kSumDx) store_partial<aligned>(partials, num_sums, kSumDx, sizes, part, sum_dx);
  }
}

// Calls `use(X, Y, aligned)`, as types: the stream has the dtype of the branch, or float32.
template <class Use>
void with_types(DType stream, DType branch, bool aligned, Use&& use) {
  dispatch(branch, [&](auto y_tag) {
    auto call = [&](auto x_tag) {
      if (aligned) use(x_tag, y_tag, std::true_type{});
      else use(x_tag, y_tag, std::false_type{});
    };
    if (stream == branch) call(y_tag);
    else call(TypeTag<float>{});
  });
}

bool rows_aligned(const Residual& residual, std::int64_t width) {
  return rows_aligned(residual.gate.array, residual.gate.stride) &&
         rows_aligned(residual.bias, width);
}

}  // namespace

void launch_gated_residual_adaln_rms_norm_fwd(Floats x, Floats branch, const Residual& residual,
                                              const Modulation& modulation, void* x_new, void* y,
                                              const NormSizes& sizes, Stream stream) {
  bool aligned = rows_aligned(x, sizes.width) && rows_aligned(branch, sizes.width) &&
                 is_aligned(x_new) && is_aligned(y) && rows_aligned(residual, sizes.width) &&
                 rows_aligned(modulation, sizes.width);
  with_types(x.dtype, branch.dtype, aligned, [&](auto x_tag, auto y_tag, auto aligned) {
    using X = typename decltype(x_tag)::type;
    using Y = typename decltype(y_tag)::type;
    constexpr const char* name = "gated_residual_adaln_rms_norm_fwd";
    launch({name, blocks(name, sizes.samples * sizes.chunks()), norm_threads(sizes.width), stream},
           gated_residual_adaln_rms_norm_fwd<X, Y, decltype(aligned)::value>,
           static_cast<const X*>(x.data), static_cast<const Y*>(branch.data), residual, modulation,
           static_cast<X*>(x_new), static_cast<Y*>(y), sizes);
  });
}

void launch_gated_residual_adaln_rms_norm_bwd(Floats x_new, Floats branch, const Residual& residual,
                                              const Modulation& modulation, const void* d_x_new,
                                              const void* d_y, void* d_x, void* d_branch,
                                              float* partials, const ModulationGradients& gradients,
                                              const NormSizes& sizes, Stream stream) {
  bool aligned = rows_aligned(x_new, sizes.width) && rows_aligned(branch, sizes.width) &&
                 is_aligned(d_x_new) && is_aligned(d_y) && is_aligned(d_x) &&
                 is_aligned(d_branch) && is_aligned(partials) &&
                 rows_aligned(residual, sizes.width) && rows_aligned(modulation, sizes.width);
  int num_sums = residual.bias.data == nullptr ? 3 : 4;
  with_types(x_new.dtype, branch.dtype, aligned, [&](auto x_tag, auto y_tag, auto aligned) {
    using X = typename decltype(x_tag)::type;
    using Y = typename decltype(y_tag)::type;
    constexpr const char* name = "gated_residual_adaln_rms_norm_bwd";
    // Only for the gradient of gate.
    const Y* added = partials == nullptr ? nullptr : static_cast<const Y*>(branch.data);
    launch({name, blocks(name, sizes.samples * sizes.chunks()), norm_threads(sizes.width), stream},
           gated_residual_adaln_rms_norm_bwd<X, Y, decltype(aligned)::value>,
           static_cast<const X*>(x_new.data), added, residual, modulation,
           static_cast<const X*>(d_x_new), static_cast<const Y*>(d_y), static_cast<X*>(d_x),
           static_cast<Y*>(d_branch), partials, num_sums, sizes);
  });
  if (partials == nullptr) return;
  if (num_sums == 3)
    launch_reduce_modulation<3>(partials, modulation, residual, gradients, sizes, stream);
  else launch_reduce_modulation<4>(partials, modulation, residual, gradients, sizes, stream);
}

}  // namespace ldit
