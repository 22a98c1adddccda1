// adaln_rms_norm: y = x̂·gain + shift, with x̂ = x / rms(x) and gain = weight·(1 + scale).
// Backward, with r = 1 / rms(x), g = d_y·gain, and means over the columns:
//
//   d_x = r·g − x·r³·mean(g·x),    d_shift = Σ d_y,    d_scale = weight·Σ d_y·x̂    (over tokens)
//   d_weight = Σ (1 + scale)·Σ d_y·x̂                                               (over samples)
//
//   x, d_x                  X [samples, tokens, width]
//   y, d_y                  Y [samples, tokens, width]
//   weight; scale, shift    [width]; [samples, width], in float32 or 16 bits
//   partials                float [samples, chunks, 2, width], the sums of a block: see PartialSum
//
// common/norm.h says what a block and a thread own.
#include "common/norm.h"

namespace ldit {
namespace {

// Tokens in flight in each thread: 64 bytes of x forward, and as much or more of x and d_y
// backward.
template <class X>
constexpr int kRowsForward = sizeof(X) == 2 ? 4 : 2;
constexpr int kRowsBackward = 2;

template <class X, class Y, bool aligned>
__global__ void __launch_bounds__(kNormThreads)
    adaln_rms_norm_fwd(const X* __restrict__ x, Modulation modulation, Y* __restrict__ y,
                       NormSizes sizes) {
  constexpr int steps = kRowsForward<X>;
  using Sums = BlockSums<steps>;
  LDIT_SHARED(float, memory, Sums::size);
  const Sums sums(memory);
  const Part part(sizes);
  float gain[kColumns], shift[kColumns];  // of the thread's columns
  load_gain<aligned>(modulation, part, gain);
  load_shift<aligned>(modulation, part, shift);
  int round = 0;
  for (std::int64_t token = part.begin; token < part.end; token += steps, round ^= 1) {
    Raw<X, kColumns> rows[steps];  // the thread's columns of `steps` tokens
    float squares[steps];          // Σx² of each token: of its columns, then of the row
#pragma unroll
    for (int i = 0; i < steps; ++i) rows[i] = load_columns<aligned>(x, sizes, part, token + i);
#pragma unroll
    for (int i = 0; i < steps; ++i) squares[i] = sum_of_squares(rows[i]);
    sums(squares, round);
    store_modulated<aligned>(y, rows, squares, gain, shift, sizes, part, token);
  }
}

template <class X, class Y, bool aligned>
__global__ void __launch_bounds__(kNormThreads)
    adaln_rms_norm_bwd(const X* __restrict__ x, Modulation modulation, const Y* __restrict__ d_y,
                       X* __restrict__ d_x, float* __restrict__ partials, NormSizes sizes) {
  using Sums = BlockSums<2 * kRowsBackward>;
  LDIT_SHARED(float, memory, Sums::size);
  const Sums sums(memory);
  const Part part(sizes);
  float gain[kColumns], sum_dy[kColumns] = {}, sum_dy_xhat[kColumns] = {};
  load_gain<aligned>(modulation, part, gain);
  int round = 0;
  for (std::int64_t token = part.begin; token < part.end; token += kRowsBackward, round ^= 1) {
    Raw<X, kColumns> rows[kRowsBackward];
    Raw<Y, kColumns> upstream[kRowsBackward];
    // Σx² and Σg·x of each token: of the thread's columns, then of the row.
    float both[2 * kRowsBackward];
#pragma unroll
    for (int i = 0; i < kRowsBackward; ++i) {
      rows[i] = load_columns<aligned>(x, sizes, part, token + i);
      upstream[i] = load_columns<aligned>(d_y, sizes, part, token + i);
    }
#pragma unroll
    for (int i = 0; i < kRowsBackward; ++i)
      sums_of_row(rows[i], upstream[i], gain, both[2 * i], both[2 * i + 1]);
    sums(both, round);
#pragma unroll
    for (int i = 0; i < kRowsBackward; ++i) {
      if (!part.has(token + i)) continue;
      const auto [r, projection] = RowGradient(both[2 * i], both[2 * i + 1], sizes);
      Raw<X, kColumns> result;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float dy = upstream[i][j], value = rows[i][j];
        result.set(j, r * dy * gain[j] - value * projection);
        sum_dy[j] += dy;
        sum_dy_xhat[j] += dy * value * r;
      }
      if (d_x != nullptr)
        store_some<aligned>(d_x + part.offset(sizes, token + i), result, part.valid);
    }
  }
  if (partials != nullptr) {
    store_partial<aligned>(partials, 2, kSumDy, sizes, part, sum_dy);
    store_partial<aligned>(partials, 2, kSumDyXhat, sizes, part, sum_dy_xhat);
  }
}

// Calls `use(X, Y, aligned)`, as types.
template <class Use>
void with_types(DType x, DType y, bool aligned, Use&& use) {
  dispatch(x, [&](auto x_tag) {
    dispatch(y, [&](auto y_tag) {
      if (aligned) use(x_tag, y_tag, std::true_type{});
      else use(x_tag, y_tag, std::false_type{});
    });
  });
}

}  // namespace

void launch_adaln_rms_norm_fwd(Floats x, const Modulation& modulation, Floats y,
                               const NormSizes& sizes, Stream stream) {
  bool aligned = rows_aligned(x, sizes.width) && rows_aligned(y, sizes.width) &&
                 rows_aligned(modulation, sizes.width);
  with_types(x.dtype, y.dtype, aligned, [&](auto x_tag, auto y_tag, auto aligned) {
    using X = typename decltype(x_tag)::type;
    using Y = typename decltype(y_tag)::type;
    constexpr const char* name = "adaln_rms_norm_fwd";
    launch({name, blocks(name, sizes.samples * sizes.chunks()), norm_threads(sizes.width), stream},
           adaln_rms_norm_fwd<X, Y, decltype(aligned)::value>, static_cast<const X*>(x.data),
           modulation, static_cast<Y*>(y.data), sizes);
  });
}

void launch_adaln_rms_norm_bwd(Floats x, const Modulation& modulation, Floats d_y, Floats d_x,
                               float* partials, Floats d_weight, Floats d_scale, Floats d_shift,
                               const NormSizes& sizes, Stream stream) {
  bool aligned = rows_aligned(x, sizes.width) && rows_aligned(d_y, sizes.width) &&
                 rows_aligned(d_x, sizes.width) && is_aligned(partials) &&
                 rows_aligned(modulation, sizes.width);
  with_types(x.dtype, d_y.dtype, aligned, [&](auto x_tag, auto y_tag, auto aligned) {
    using X = typename decltype(x_tag)::type;
    using Y = typename decltype(y_tag)::type;
    constexpr const char* name = "adaln_rms_norm_bwd";
    launch({name, blocks(name, sizes.samples * sizes.chunks()), norm_threads(sizes.width), stream},
           adaln_rms_norm_bwd<X, Y, decltype(aligned)::value>, static_cast<const X*>(x.data),
           modulation, static_cast<const Y*>(d_y.data), static_cast<X*>(d_x.data), partials, sizes);
  });
  if (partials != nullptr) {
    launch_reduce_modulation<2>(partials, modulation, {}, {d_weight, d_scale, d_shift, {}, {}},
                                sizes, stream);
  }
}

}  // namespace ldit
