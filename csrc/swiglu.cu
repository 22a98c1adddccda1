// swiglu: out = silu(a)·b, where a and b are the halves of a row of gate_up + bias. Backward, with
// s = sigmoid(a):
//
//   d_a = d_out·b·s·(1 + a·(1 − s)),    d_b = d_out·a·s,    d_bias = Σ over rows of [d_a, d_b]
//
// Bound by memory: every byte is read once and written once. A thread owns `count` neighbouring
// columns of both halves and walks down rows_per_block rows, `rows` of them in flight: the bias,
// and the sums over rows that are its gradient, stay in registers. The widest access that divides
// the addresses of all rows is taken: 16 bytes where the width allows it, 4 bytes for bf16 rows of
// 2730, else one element.
//
//   gate_up, d_gate_up    T [rows, 2·width]
//   out, d_out            T [rows, width]
//   partials              float [parts, 2·width]: sums over the rows of one part
//
// A grid of parts × strips: a strip is the columns of one block, count·kThreads of each half.
#include "common/column_sums.h"
#include "common/math.h"

namespace ldit {
namespace {

constexpr int kThreads = 128;

// The thread's columns [column, column + count), of each half, and its block's rows [begin, end).
template <int count>
struct Strip {
  std::int64_t part, begin, end, column;

  static constexpr __host__ __device__ std::int64_t strips(std::int64_t width) {
    return (width / count + kThreads - 1) / kThreads;
  }
  LDIT_DEVICE explicit Strip(const SwigluSizes& sizes) {
    unsigned across = strips(sizes.width);
    part = blockIdx.x / across;
    column = (std::int64_t(blockIdx.x - part * across) * kThreads + threadIdx.x) * count;
    begin = part * sizes.rows_per_block;
    end = min(begin + sizes.rows_per_block, sizes.rows);
  }
};

template <class T, int count, int rows, bool biased>
__global__ void __launch_bounds__(kThreads)
    swiglu_fwd(const T* __restrict__ gate_up, Floats bias, T* __restrict__ out, SwigluSizes sizes) {
  const Strip<count> strip(sizes);
  const std::int64_t width = sizes.width;
  if (strip.column >= width) return;
  float gate_bias[count] = {}, up_bias[count] = {};
  if constexpr (biased) {
    load_floats<false>(bias, strip.column, count, gate_bias);
    load_floats<false>(bias, width + strip.column, count, up_bias);
  }
  for (std::int64_t row = strip.begin; row < strip.end; row += rows) {
    Raw<T, count> gate[rows], up[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      if (row + i >= strip.end) continue;
      const T* from = gate_up + (row + i) * 2 * width + strip.column;
      gate[i] = load<count>(from);
      up[i] = load<count>(from + width);
    }
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      if (row + i >= strip.end) continue;
      Raw<T, count> result;
#pragma unroll
      for (int j = 0; j < count; ++j) {
        float a = gate[i][j] + gate_bias[j];
        result.set(j, a * sigmoid(a) * (up[i][j] + up_bias[j]));
      }
      store(out + (row + i) * width + strip.column, result);
    }
  }
}

template <int count>
LDIT_DEVICE void store_sums(float* to, const float (&sums)[count]) {
#pragma unroll
  for (int j = 0; j < count; ++j) to[j] = sums[j];
}

template <class T, int count, int rows, bool biased>
__global__ void __launch_bounds__(kThreads)
    swiglu_bwd(const T* __restrict__ gate_up, Floats bias, const T* __restrict__ d_out,
               T* __restrict__ d_gate_up, float* __restrict__ partials, SwigluSizes sizes) {
  const Strip<count> strip(sizes);
  const std::int64_t width = sizes.width;
  if (strip.column >= width) return;
  // Of the thread's columns, as are the rows loaded below.
  float gate_bias[count] = {}, up_bias[count] = {}, gate_sums[count] = {}, up_sums[count] = {};
  if constexpr (biased) {
    load_floats<false>(bias, strip.column, count, gate_bias);
    load_floats<false>(bias, width + strip.column, count, up_bias);
  }
  for (std::int64_t row = strip.begin; row < strip.end; row += rows) {
    Raw<T, count> gate[rows], up[rows], upstream[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      if (row + i >= strip.end) continue;
      const T* from = gate_up + (row + i) * 2 * width + strip.column;
      gate[i] = load<count>(from);
      up[i] = load<count>(from + width);
      upstream[i] = load<count>(d_out + (row + i) * width + strip.column);
    }
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      if (row + i >= strip.end) continue;
      Raw<T, count> d_gate, d_up;
#pragma unroll
      for (int j = 0; j < count; ++j) {
        float a = gate[i][j] + gate_bias[j], b = up[i][j] + up_bias[j], d = upstream[i][j],
              s = sigmoid(a);
        float d_a = d * b * s * (1.f + a * (1.f - s)), d_b = d * a * s;
        d_gate.set(j, d_a);
        d_up.set(j, d_b);
        gate_sums[j] += d_a;
        up_sums[j] += d_b;
      }
      T* to = d_gate_up + (row + i) * 2 * width + strip.column;
      store(to, d_gate);
      store(to + width, d_up);
    }
  }
  if (biased && partials != nullptr) {
    float* to = partials + strip.part * 2 * width + strip.column;
    store_sums(to, gate_sums);
    store_sums(to + width, up_sums);
  }
}

// The bytes of one access, 16, 4 or 1 (an element), that divide the address of every row, in both
// halves of all arrays.
int access_bytes(std::int64_t row_bytes, std::initializer_list<const void*> arrays) {
  for (int bytes : {16, 4}) {
    bool divides = row_bytes % bytes == 0;
    for (const void* array : arrays) divides = divides && is_aligned(array, bytes);
    if (divides) return bytes;
  }
  return 1;
}

// Calls `use(T, count, rows, biased)`, as types: what is accessed at once, and in how many rows
// before any is used.
template <class Use>
void with_access(Floats gate_up, bool biased, int bytes, Use&& use) {
  dispatch(gate_up.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto call = [&](auto count, auto rows) {
      if (biased) use(tag, count, rows, std::true_type{});
      else use(tag, count, rows, std::false_type{});
    };
    if (bytes == 16)
      return call(std::integral_constant<int, kVector<T>>{}, std::integral_constant<int, 2>{});
    if (bytes == 4 && sizeof(T) < 4)
      return call(std::integral_constant<int, 2>{}, std::integral_constant<int, 4>{});
    call(std::integral_constant<int, 1>{}, std::integral_constant<int, 4>{});
  });
}

std::int64_t row_bytes(const Floats& gate_up, const SwigluSizes& sizes) {
  return sizes.width * (gate_up.dtype == DType::float32 ? 4 : 2);
}

}  // namespace

void launch_swiglu_fwd(Floats gate_up, Floats bias, void* out, const SwigluSizes& sizes,
                       Stream stream) {
  int bytes = access_bytes(row_bytes(gate_up, sizes), {gate_up.data, out});
  with_access(
      gate_up, bias.data != nullptr, bytes, [&](auto tag, auto count, auto rows, auto biased) {
        using T = typename decltype(tag)::type;
        dim3 grid = blocks("swiglu_fwd",
                           Strip<decltype(count)::value>::strips(sizes.width) * sizes.parts());
        launch(
            {"swiglu_fwd", grid, kThreads, stream},
            swiglu_fwd<T, decltype(count)::value, decltype(rows)::value, decltype(biased)::value>,
            static_cast<const T*>(gate_up.data), bias, static_cast<T*>(out), sizes);
      });
}

void launch_swiglu_bwd(Floats gate_up, Floats bias, const void* d_out, void* d_gate_up,
                       float* partials, Floats d_bias, const SwigluSizes& sizes, Stream stream) {
  int bytes = access_bytes(row_bytes(gate_up, sizes), {gate_up.data, d_out, d_gate_up});
  with_access(
      gate_up, bias.data != nullptr, bytes, [&](auto tag, auto count, auto rows, auto biased) {
        using T = typename decltype(tag)::type;
        dim3 grid = blocks("swiglu_bwd",
                           Strip<decltype(count)::value>::strips(sizes.width) * sizes.parts());
        launch(
            {"swiglu_bwd", grid, kThreads, stream},
            swiglu_bwd<T, decltype(count)::value, decltype(rows)::value, decltype(biased)::value>,
            static_cast<const T*>(gate_up.data), bias, static_cast<const T*>(d_out),
            static_cast<T*>(d_gate_up), partials, sizes);
      });
  if (partials != nullptr)
    launch_column_sums(partials, d_bias, sizes.parts(), 2 * sizes.width, stream);
}

}  // namespace ldit
