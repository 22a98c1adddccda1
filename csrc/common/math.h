// Transcendental functions by the fast instructions, a few ulp from the exact value.
#pragma once

#include "platform.h"

namespace ldit {

LDIT_DEVICE float fast_exp(float x) { return __expf(x); }
LDIT_DEVICE float fast_log(float x) { return __logf(x); }
LDIT_DEVICE float fast_rsqrt(float x) { return rsqrtf(x); }
LDIT_DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }

// 2^x; attention holds its scores in units of log 2 to save a multiplication.
LDIT_DEVICE float fast_exp2(float x) {
#ifdef LDIT_EMULATED
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Of x from −∞ to ∞ without an overflow on the way that would show: 1 / (1 + e^−x).
LDIT_DEVICE float sigmoid(float x) { return 1.f / (1.f + fast_exp(-x)); }

}  // namespace ldit
