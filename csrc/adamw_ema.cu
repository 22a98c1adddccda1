// adamw_ema_: one step of AdamW, of the moving average of the weights and of their bfloat16 copy,
// in place. For each number p with gradient g, m and v being its exp_avg and exp_avg_sq:
//
//   g = grad·grad_scale,    m = β₁·m + (1 − β₁)·g,    v = β₂·v + (1 − β₂)·g²
//   p = p − lr·(m̂ / (√v̂ + eps) + weight_decay·p),     m̂ = m / (1 − β₁^step), v̂ = v / (1 − β₂^step)
//   ema = ema_decay·ema + (1 − ema_decay)·p
//
// Bound by memory: 36 bytes a number with a bfloat16 gradient and a copy, half of them read and
// half written. A thread takes four neighbours, one access of 16 bytes to each float32 array, and
// the threads of a warp lie side by side: longer vectors for the 16-bit arrays would leave gaps
// between the float32 accesses of a warp. A block owns `steps` × kVectors × kThreads × 4
// neighbours. Step, learning rate, gradient scale and skip flag are read on the device; a block of
// a skipped step reads nothing else.
#include <cmath>

#include "common/launch.h"
#include "common/vector.h"

namespace ldit {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // of one thread, in flight at a time: 5 loads each

// The hyperparameters as float32, each rounded once from float64.
struct Rates {
  float beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, weight_decay, ema_decay, ema_rest;

  explicit Rates(const AdamWHyperparams& s)
      : beta1(float(s.beta1)), rest1(float(1 - s.beta1)), log_beta1(float(std::log(s.beta1))),
        beta2(float(s.beta2)), rest2(float(1 - s.beta2)), log_beta2(float(std::log(s.beta2))),
        eps(float(s.eps)), weight_decay(float(s.weight_decay)), ema_decay(float(s.ema_decay)),
        ema_rest(float(1 - s.ema_decay)) {}
};

template <class T>
LDIT_DEVICE double first(const void* data) {
  return static_cast<double>(*static_cast<const T*>(data));
}

LDIT_DEVICE double read(const Scalar& scalar) {
  switch (scalar.type) {
    case ScalarType::float64: return first<double>(scalar.data);
    case ScalarType::float32: return first<float>(scalar.data);
    case ScalarType::float16: return to_float(*static_cast<const fp16*>(scalar.data));
    case ScalarType::bfloat16: return to_float(*static_cast<const bf16*>(scalar.data));
    case ScalarType::int64: return first<std::int64_t>(scalar.data);
    case ScalarType::int32: return first<std::int32_t>(scalar.data);
    case ScalarType::int16: return first<std::int16_t>(scalar.data);
    case ScalarType::int8: return first<std::int8_t>(scalar.data);
    case ScalarType::uint8: return first<std::uint8_t>(scalar.data);
  }
  return 0;
}

// 1 / (1 − β^step). The power would cancel where β is near 1: 1 − 0.999 has four digits in float32.
LDIT_DEVICE float correction(float log_beta, float step) { return 1.f / -expm1f(log_beta * step); }

// keep·old + take·new for keep + take = 1, as a step from the nearer one, so that the weights add
// up to exactly 1. Each rounded to float32 they do not, and an average over 10⁴ steps would settle
// at 1e-4 beside what it averages.
LDIT_DEVICE float blend(float old, float now, float keep, float take) {
  return take < 0.5f ? old + take * (now - old) : now - keep * (now - old);
}

struct Pointers {
  float *param, *exp_avg, *exp_avg_sq, *ema;
  const void* grad;
  bf16* copy;
};

template <class G, int count>
__global__ void __launch_bounds__(kThreads)
    adamw_ema(Pointers arrays, AdamWScalars scalars, Rates rates, std::int64_t numbers, int steps) {
  if (read(scalars.skip) != 0) return;
  const float step = float(read(scalars.step)), lr = float(read(scalars.lr)),
              scale = float(read(scalars.grad_scale));
  const float m_scale = correction(rates.log_beta1, step),
              v_scale = correction(rates.log_beta2, step);
  const G* grad = static_cast<const G*>(arrays.grad);
  constexpr int stride = kThreads * count;
  std::int64_t begin = std::int64_t(blockIdx.x) * steps * kVectors * stride + threadIdx.x * count;
  for (int i = 0; i < steps; ++i, begin += kVectors * stride) {
    Raw<float, count> param[kVectors], exp_avg[kVectors], exp_avg_sq[kVectors], ema[kVectors];
    Raw<G, count> gradient[kVectors];
    auto access = [&](std::int64_t at, auto full, auto tail) {
      if (at + count <= numbers) full();
      else if (at < numbers) tail(numbers - at);
    };
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      std::int64_t at = begin + k * stride;
      auto fetch = [&](auto tag, std::int64_t valid) {
        constexpr bool aligned = decltype(tag)::value;
        param[k] = load_some<aligned, count>(arrays.param + at, valid);
        gradient[k] = load_some<aligned, count>(grad + at, valid);
        exp_avg[k] = load_some<aligned, count>(arrays.exp_avg + at, valid);
        exp_avg_sq[k] = load_some<aligned, count>(arrays.exp_avg_sq + at, valid);
        ema[k] = load_some<aligned, count>(arrays.ema + at, valid);
      };
      access(
          at, [&] { fetch(std::true_type{}, count); },
          [&](std::int64_t valid) { fetch(std::false_type{}, valid); });
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      std::int64_t at = begin + k * stride;
      if (at >= numbers) continue;
      Raw<bf16, count> copy;
#pragma unroll
      for (int j = 0; j < count; ++j) {
        float g = gradient[k][j] * scale, p = param[k][j];
        float m = rates.beta1 * exp_avg[k][j] + rates.rest1 * g;
        float v = rates.beta2 * exp_avg_sq[k][j] + rates.rest2 * (g * g);
        p -= lr * (m * m_scale / (sqrtf(v * v_scale) + rates.eps) + rates.weight_decay * p);
        param[k].set(j, p);
        exp_avg[k].set(j, m);
        exp_avg_sq[k].set(j, v);
        ema[k].set(j, blend(ema[k][j], p, rates.ema_decay, rates.ema_rest));
        copy.set(j, p);
      }
      auto put = [&](auto tag, std::int64_t valid) {
        constexpr bool aligned = decltype(tag)::value;
        store_some<aligned>(arrays.param + at, param[k], valid);
        store_some<aligned>(arrays.exp_avg + at, exp_avg[k], valid);
        store_some<aligned>(arrays.exp_avg_sq + at, exp_avg_sq[k], valid);
        store_some<aligned>(arrays.ema + at, ema[k], valid);
        if (arrays.copy != nullptr) store_some<aligned>(arrays.copy + at, copy, valid);
      };
      access(
          at, [&] { put(std::true_type{}, count); },
          [&](std::int64_t valid) { put(std::false_type{}, valid); });
    }
  }
}

}  // namespace

void launch_adamw_ema(const AdamWArrays& arrays, const AdamWScalars& scalars,
                      const AdamWHyperparams& hyperparams, std::int64_t numbers,
                      std::int64_t elements_per_block, Stream stream) {
  bool bf16_grad = arrays.grad.dtype == DType::bfloat16;
  bool aligned = is_aligned(arrays.param) && is_aligned(arrays.exp_avg) &&
                 is_aligned(arrays.exp_avg_sq) && is_aligned(arrays.ema) &&
                 is_aligned(arrays.grad.data, bf16_grad ? 8 : 16) &&
                 is_aligned(arrays.bf16_param, 8);
  Pointers pointers{arrays.param, arrays.exp_avg,   arrays.exp_avg_sq,
                    arrays.ema,   arrays.grad.data, static_cast<bf16*>(arrays.bf16_param)};
  auto run = [&](auto kernel, int count) {
    std::int64_t step = kThreads * kVectors * count, steps = (elements_per_block + step - 1) / step;
    dim3 grid = blocks("adamw_ema", (numbers + steps * step - 1) / (steps * step));
    launch({"adamw_ema", grid, kThreads, stream}, kernel, pointers, scalars, Rates(hyperparams),
           numbers, int(steps));
  };
  if (bf16_grad) aligned ? run(adamw_ema<bf16, 4>, 4) : run(adamw_ema<bf16, 1>, 1);
  else aligned ? run(adamw_ema<float, 4>, 4) : run(adamw_ema<float, 1>, 1);
}

}  // namespace ldit
