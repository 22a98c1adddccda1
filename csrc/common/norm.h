// Parts of the modulated RMS norms: which tokens and columns a block and a thread own, the norm of
// a row and its gradient, and the second stage of the gradients of the modulation.
//
// A block owns tokens_per_block tokens of one sample, a chunk, and takes a few of them at a time.
// Thread t owns columns 8·t to 8·t + 8 of each (kColumns). So what belongs to a column, the
// modulation and in the backward pass the sums over tokens, stays in its registers, float [8]; only
// the sums over a row are exchanged between threads, by way of 2 × 32 floats for each in shared
// memory and with one barrier for each step of `rows` tokens (BlockSums).
#pragma once

#include "column_sums.h"
#include "math.h"
#include "reduce.h"

namespace ldit {

constexpr int kColumns = 8;  // of one thread; 16 bytes of bf16, 32 of float32
constexpr int kNormThreads = kMaxNormWidth / kColumns;

inline unsigned norm_threads(std::int64_t width) {
  return static_cast<unsigned>((width + kColumns * kWarp - 1) / (kColumns * kWarp) * kWarp);
}

// Whether every thread's columns of `array` can be accessed by 16 bytes at a time: the pointer and
// the stride of the rows allow it.
inline bool rows_aligned(const Floats& array, std::int64_t stride) {
  return is_aligned(array.data) && stride % kColumns == 0;
}
inline bool rows_aligned(const Modulation& m, std::int64_t width) {
  return rows_aligned(m.weight, width) && rows_aligned(m.scale.array, m.scale.stride) &&
         rows_aligned(m.shift.array, m.shift.stride);
}

// The tokens that a block owns, and the columns that a thread owns.
struct Part {
  std::int64_t sample, chunk, begin, end;  // tokens [begin, end) of the sample
  int column, valid;  // columns [column, column + valid); valid is 0 for threads past the row

  LDIT_DEVICE explicit Part(const NormSizes& sizes) {
    std::int64_t chunks = sizes.chunks();
    sample = blockIdx.x / unsigned(chunks);
    chunk = blockIdx.x - sample * chunks;
    begin = chunk * sizes.tokens_per_block;
    end = min(begin + sizes.tokens_per_block, sizes.tokens);
    column = threadIdx.x * kColumns;
    valid = max(min(int(sizes.width) - column, kColumns), 0);
  }
  LDIT_DEVICE bool has(std::int64_t token) const { return token < end && valid > 0; }
  // Of the thread's columns of a token, in an array [samples, tokens, width].
  LDIT_DEVICE std::int64_t offset(const NormSizes& sizes, std::int64_t token) const {
    return (sample * sizes.tokens + token) * sizes.width + column;
  }
};

// Loads the thread's columns of a token, zeros where there are none.
template <bool aligned, class T>
LDIT_DEVICE Raw<T, kColumns> load_columns(const T* array, const NormSizes& sizes, const Part& part,
                                          std::int64_t token) {
  if (!part.has(token)) return Raw<T, kColumns>{};
  return load_some<aligned, kColumns>(array + part.offset(sizes, token), part.valid);
}

// Zeros for a null array as well.
template <bool aligned, class T>
LDIT_DEVICE Raw<T, kColumns> load_if_given(const T* array, const NormSizes& sizes, const Part& part,
                                           std::int64_t token) {
  if (array == nullptr) return Raw<T, kColumns>{};
  return load_columns<aligned>(array, sizes, part, token);
}

// weight·(1 + scale) of the thread's columns.
template <bool aligned>
LDIT_DEVICE void load_gain(const Modulation& m, const Part& part, float (&gain)[kColumns]) {
  float scale[kColumns];
  load_floats<aligned>(m.weight, part.column, part.valid, gain);
  load_floats<aligned>(m.scale.array, part.sample * m.scale.stride + part.column, part.valid,
                       scale);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) gain[j] *= 1.f + scale[j];
}

template <bool aligned>
LDIT_DEVICE void load_shift(const Modulation& m, const Part& part, float (&shift)[kColumns]) {
  load_floats<aligned>(m.shift.array, part.sample * m.shift.stride + part.column, part.valid,
                       shift);
}

LDIT_DEVICE float inverse_rms(float sum_of_squares, const NormSizes& sizes) {
  return fast_rsqrt(sum_of_squares / static_cast<float>(sizes.width) + sizes.eps);
}

// Σx² over the thread's columns.
template <class X>
LDIT_DEVICE float sum_of_squares(const Raw<X, kColumns>& x) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) sum += x[j] * x[j];
  return sum;
}

// Writes y = x / rms(x)·gain + shift, rounded once, of rows from `token` on; `squares` are their
// Σx².
template <bool aligned, class X, class Y, int count>
LDIT_DEVICE void store_modulated(Y* y, const Raw<X, kColumns> (&rows)[count],
                                 const float (&squares)[count], const float (&gain)[kColumns],
                                 const float (&shift)[kColumns], const NormSizes& sizes,
                                 const Part& part, std::int64_t token) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (!part.has(token + i)) continue;
    // Converted before the root is taken: the compiler then needs fewer registers.
    float row[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) row[j] = rows[i][j];
    float r = inverse_rms(squares[i], sizes);
    Raw<Y, kColumns> result;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) result.set(j, row[j] * r * gain[j] + shift[j]);
    store_some<aligned>(y + part.offset(sizes, token + i), result, part.valid);
  }
}

// --- Gradient of a row: with r = 1 / rms(x), g = d_y·gain and means over the columns,
//
//   d_x = r·g − x·r³·mean(g·x).

// The thread's columns of Σx² and Σg·x.
template <class X, class Y>
LDIT_DEVICE void sums_of_row(const Raw<X, kColumns>& x, const Raw<Y, kColumns>& d_y,
                             const float (&gain)[kColumns], float& squares, float& products) {
  squares = products = 0.f;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    squares += x[j] * x[j];
    products += d_y[j] * gain[j] * x[j];
  }
}

struct RowGradient {
  float r, projection;  // d_x = r·g − x·projection

  LDIT_DEVICE RowGradient(float squares, float products, const NormSizes& sizes)
      : r(inverse_rms(squares, sizes)),
        projection(products / static_cast<float>(sizes.width) * r * r * r) {}
};

// --- Gradients of a modulation: sums over tokens, a part of them by each block of the first stage.

// The sums over tokens in `partials` [samples, chunks, num_sums, width], in this order: Σ d_y (for
// the gradient of shift), Σ d_y·x/rms(x) (scale and weight), Σ d_x'·branch (gate), Σ d_x' (bias,
// gate).
enum PartialSum { kSumDy, kSumDyXhat, kSumDxBranch, kSumDx };

template <bool aligned>
LDIT_DEVICE void store_partial(float* partials, int num_sums, PartialSum which,
                               const NormSizes& sizes, const Part& part,
                               const float (&sum)[kColumns]) {
  if (part.valid == 0) return;
  Raw<float, kColumns> raw;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) raw.set(j, sum[j]);
  float* row =
      partials + ((part.sample * sizes.chunks() + part.chunk) * num_sums + which) * sizes.width;
  store_some<aligned>(row + part.column, raw, part.valid);
}

// The second stage: partials [samples, chunks, num_sums, width] become the gradients of weight
// [width], scale, shift and gate [samples, width] and bias [width]. A block owns kSumThreadsX
// columns, and each of its kSumThreadsY threads of a column every kSumThreadsY-th sample, with all
// chunks of it; the sums over samples then meet in shared memory.
template <int num_sums>
__global__ void __launch_bounds__(kSumThreads)
    reduce_modulation(const float* __restrict__ partials, Modulation modulation, Residual residual,
                      ModulationGradients gradients, NormSizes sizes) {
  LDIT_SHARED(float, dw_sums, kSumThreads);
  int ty = threadIdx.x / kSumThreadsX;
  std::int64_t column = std::int64_t(blockIdx.x) * kSumThreadsX + threadIdx.x % kSumThreadsX;
  std::int64_t chunks = sizes.chunks();
  bool mine = column < sizes.width;
  float weight_sum = 0.f, weight = mine ? load_float(modulation.weight, column) : 0.f;
  float bias_sum = 0.f, bias = 0.f;
  if constexpr (num_sums > kSumDx) bias = mine ? load_float(residual.bias, column) : 0.f;
  for (std::int64_t sample = ty; mine && sample < sizes.samples; sample += kSumThreadsY) {
    float sums[num_sums] = {};
    const float* from = partials + sample * chunks * num_sums * sizes.width + column;
#pragma unroll 4
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
#pragma unroll
      for (int k = 0; k < num_sums; ++k) sums[k] += from[(chunk * num_sums + k) * sizes.width];
    std::int64_t at = sample * sizes.width + column;
    store_float(gradients.shift, at, sums[kSumDy]);
    store_float(gradients.scale, at, weight * sums[kSumDyXhat]);
    if constexpr (num_sums > kSumDx) {
      sums[kSumDxBranch] += bias * sums[kSumDx];
      bias_sum +=
          load_float(residual.gate.array, sample * residual.gate.stride + column) * sums[kSumDx];
    }
    if constexpr (num_sums > kSumDxBranch) store_float(gradients.gate, at, sums[kSumDxBranch]);
    float scale = load_float(modulation.scale.array, sample * modulation.scale.stride + column);
    weight_sum += (1.f + scale) * sums[kSumDyXhat];
  }
  weight_sum = block_column_sum(dw_sums, weight_sum);
  if (ty == 0 && mine) store_float(gradients.weight, column, weight_sum);
  if constexpr (num_sums > kSumDx) {
    LDIT_SHARED(float, db_sums, kSumThreads);
    bias_sum = block_column_sum(db_sums, bias_sum);
    if (ty == 0 && mine) store_float(gradients.bias, column, bias_sum);
  }
}

template <int num_sums>
void launch_reduce_modulation(const float* partials, const Modulation& modulation,
                              const Residual& residual, const ModulationGradients& gradients,
                              const NormSizes& sizes, Stream stream) {
  dim3 grid = blocks("reduce_modulation", (sizes.width + kSumThreadsX - 1) / kSumThreadsX);
  launch({"reduce_modulation", grid, kSumThreads, stream}, reduce_modulation<num_sums>, partials,
         modulation, residual, gradients, sizes);
}

}  // namespace ldit
