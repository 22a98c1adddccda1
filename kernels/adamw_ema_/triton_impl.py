"""AdamW, moving average and bfloat16 copy in Triton: one launch, every number read and written once.

Step, learning rate, gradient scale and skip flag are read by each program from device memory, where they stay in a
cache. A skipped step ends after that and moves nothing. All accesses to float32 have 128 bits whatever n is: only the
last program masks.
"""

from dataclasses import dataclass
from functools import partial
from math import inf, log

import triton
import triton.language as tl

from kernels.adamw_ema_.operator import DTYPES, in_place, reasons
from kernels.backends.triton_launch import INTERPRETED, backend, launch, unsupported_reasons

ROUND_BY_HAND = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class LaunchConfig:
    """What one program updates: `numbers` elements, by `warps` warps."""

    numbers: int
    warps: int


def launch_config(numbers: int) -> LaunchConfig:
    """Four elements for each thread: one 128-bit access to each float32 tensor, neighbouring threads side by side.

    With more, the 128-bit access to the bfloat16 tensors would want eight, and float32 stores would have gaps or go
    through shared memory. Five such loads a thread, and registers for 1280 threads on a multiprocessor, keep
    100 KB under way, several times what the latency of device memory asks for. Few numbers get fewer threads.
    """
    warps = min(max(triton.next_power_of_2(numbers) // 128, 1), 8)
    return LaunchConfig(128 * warps, warps)


@triton.jit
def one_minus_power(log_beta, step):
    """1 − β^step from ln β to all digits of float32: near 1 by the series of the exponential, which cancels nothing."""
    x = log_beta * step
    near = tl.maximum(x, -1.0)
    series = 1.0
    for i in tl.static_range(10):
        series = 1 + series * (near * (1 / (11 - i)))
    return tl.where(x > -1, -near * series, 1 - tl.exp(x))


@triton.jit
def _rounded(x):
    """`x` with the digits of a bfloat16, to nearest even; Triton's interpreter would cut them off."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _blend(old, new, keep, take):
    """keep·old + take·new for keep + take = 1, as a step from the nearer one, so that the weights add up to exactly 1.

    Each rounded to float32 they do not, and an average over 10⁴ steps would settle at 1e-4 beside what it averages.
    """
    near = take < 0.5
    return tl.where(near, old, new) + tl.where(near, take, -keep) * (new - old)


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, ema, bf16_param, at, inside, t, lr, scale,
    beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, weight_decay, ema_decay, ema_rest, COPIED: tl.constexpr,
):  # fmt: skip
    p = tl.load(param + at, inside)
    g = tl.load(grad + at, inside).to(tl.float32)
    m = tl.load(exp_avg + at, inside)
    v = tl.load(exp_avg_sq + at, inside)
    e = tl.load(ema + at, inside)
    # While these are under way, the numbers that all elements share.
    m_scale = 1 / one_minus_power(log_beta1, t)
    v_scale = 1 / one_minus_power(log_beta2, t)
    g *= scale
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    p -= lr * (tl.div_rn(m * m_scale, tl.sqrt_rn(v * v_scale) + eps) + weight_decay * p)
    tl.store(param + at, p, inside)
    tl.store(exp_avg + at, m, inside)
    tl.store(exp_avg_sq + at, v, inside)
    tl.store(ema + at, _blend(e, p, ema_decay, ema_rest), inside)
    if COPIED:
        tl.store(bf16_param + at, (_rounded(p) if ROUND_BY_HAND else p).to(tl.bfloat16), inside)


@triton.jit
def adamw_ema_kernel(
    param, grad, exp_avg, exp_avg_sq, ema, bf16_param, step, lr, grad_scale, skip, numbers,
    beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, weight_decay, ema_decay, ema_rest,
    BLOCK: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    t, rate, scale = tl.load(step).to(tl.float32), tl.load(lr).to(tl.float32), tl.load(grad_scale).to(tl.float32)
    if tl.load(skip) == 0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        at = tl.arange(0, BLOCK)
        if start + BLOCK <= numbers:
            _update(param + start, grad + start, exp_avg + start, exp_avg_sq + start, ema + start, bf16_param + start,
                    at, None, t, rate, scale, beta1, rest1, log_beta1, beta2, rest2, log_beta2,
                    eps, weight_decay, ema_decay, ema_rest, COPIED)  # fmt: skip
        else:
            _update(param + start, grad + start, exp_avg + start, exp_avg_sq + start, ema + start, bf16_param + start,
                    at, start + at < numbers, t, rate, scale, beta1, rest1, log_beta1, beta2, rest2, log_beta2,
                    eps, weight_decay, ema_decay, ema_rest, COPIED)  # fmt: skip


def update(
    param, grad, exp_avg, exp_avg_sq, ema, bf16_param, step, lr, grad_scale, skip, beta1, beta2, eps, weight_decay,
    ema_decay,
) -> None:  # fmt: skip
    numbers = param.numel()
    config = launch_config(numbers)
    launch(
        adamw_ema_kernel, (triton.cdiv(numbers, config.numbers),),
        param, grad, exp_avg, exp_avg_sq, ema, param if bf16_param is None else bf16_param,
        step, lr, grad_scale, skip, numbers,
        beta1, 1 - beta1, log(beta1) if beta1 else -inf, beta2, 1 - beta2, log(beta2) if beta2 else -inf,
        eps, weight_decay, ema_decay, 1 - ema_decay,
        BLOCK=config.numbers, COPIED=bf16_param is not None, num_warps=config.warps,
    )  # fmt: skip


adamw_ema_ = in_place("adamw_ema_", update)
unsupported = partial(reasons, unsupported_reasons)

BACKEND = backend(
    adamw_ema_,
    unsupported,
    torch_ops=("ldit::adamw_ema_",),
    configs={"update": launch_config(84_407_092)},
    dtypes=DTYPES,
)
