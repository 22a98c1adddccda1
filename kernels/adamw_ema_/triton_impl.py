"""The Triton backend of `adamw_ema_`: one launch, every element read and written once.

Step, learning rate, gradient scale and skip flag are read by each program from device memory, where they stay in a
cache. A skipped step ends after that and moves nothing. All accesses to float32 have 128 bits whatever n is: only the
last program masks.

Shapes in the comments at the ends of lines: [BLOCK] are the elements of a program, [] is one number. `p`, `g`, `m`, `v`
and `e` are param, grad, exp_avg, exp_avg_sq and ema in registers; `one_minus_…` comes rounded once from float64.
"""

from dataclasses import dataclass
from functools import partial
from math import inf, log

import triton
import triton.language as tl

from kernels.adamw_ema_.operator import DTYPES, reasons, register_op
from kernels.backends.triton_launch import INTERPRETED, backend, launch, unsupported_reasons

ROUND_BY_HAND = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of the update: `elements` of a program, and its `warps`."""

    elements: int
    warps: int


def launch_config(n: int) -> LaunchConfig:
    """Four elements for each thread: one 128-bit access to each float32 tensor, neighbouring threads side by side.

    With more, the 128-bit access to the bfloat16 tensors would want eight, and float32 stores would have gaps or go
    through shared memory. Five such loads a thread, and registers for 1280 threads on a multiprocessor, keep
    100 KB under way, several times what the latency of device memory asks for. Few elements get fewer threads.
    """
    warps = min(max(triton.next_power_of_2(n) // 128, 1), 8)
    return LaunchConfig(128 * warps, warps)


@triton.jit
def one_minus_power(log_beta, step):
    """1 − β^step from ln β to all digits of float32: near 1 by the series of the exponential, which cancels nothing."""
    x = log_beta * step  # []
    near = tl.maximum(x, -1.0)  # []
    series = 1.0
    for i in tl.static_range(10):
        series = 1 + series * (near * (1 / (11 - i)))  # []
    return tl.where(x > -1, -near * series, 1 - tl.exp(x))  # []


@triton.jit
def _round_to_bf16(x):
    """`x` with the digits of a bfloat16, to nearest even; Triton's interpreter would truncate."""
    bits = x.to(tl.int32, bitcast=True)  # [BLOCK]
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _lerp(old, new, decay, one_minus_decay):
    """decay·old + (1 − decay)·new, as a step from the nearer one, so that the weights add up to exactly 1.

    Each rounded to float32 they do not, and an average over 10⁴ steps would settle at 1e-4 beside what it averages.
    """
    from_old = one_minus_decay < 0.5  # []
    return tl.where(from_old, old, new) + tl.where(from_old, one_minus_decay, -decay) * (new - old)  # [BLOCK]


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, ema, bf16_param, offsets, mask, step, lr, grad_scale,
    beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, weight_decay,
    ema_decay, one_minus_ema_decay, WRITE_BF16: tl.constexpr,
):  # fmt: skip
    p = tl.load(param + offsets, mask)  # [BLOCK]
    g = tl.load(grad + offsets, mask).to(tl.float32)  # [BLOCK]
    m = tl.load(exp_avg + offsets, mask)  # [BLOCK]
    v = tl.load(exp_avg_sq + offsets, mask)  # [BLOCK]
    e = tl.load(ema + offsets, mask)  # [BLOCK]
    # While these are under way, the numbers that all elements share: 1 / (1 − β1^step), 1 / (1 − β2^step).
    m_scale = 1 / one_minus_power(log_beta1, step)  # []
    v_scale = 1 / one_minus_power(log_beta2, step)  # []
    # m = β1·m + (1 − β1)·g, v = β2·v + (1 − β2)·g², with g = grad·grad_scale
    g *= grad_scale
    m = beta1 * m + one_minus_beta1 * g  # [BLOCK]
    v = beta2 * v + one_minus_beta2 * (g * g)  # [BLOCK]
    # p = p − lr·(m̂ / (sqrt(v̂) + eps) + weight_decay·p)
    p -= lr * (tl.div_rn(m * m_scale, tl.sqrt_rn(v * v_scale) + eps) + weight_decay * p)  # [BLOCK]
    tl.store(param + offsets, p, mask)
    tl.store(exp_avg + offsets, m, mask)
    tl.store(exp_avg_sq + offsets, v, mask)
    # e = ema_decay·e + (1 − ema_decay)·p
    tl.store(ema + offsets, _lerp(e, p, ema_decay, one_minus_ema_decay), mask)
    if WRITE_BF16:
        tl.store(bf16_param + offsets, (_round_to_bf16(p) if ROUND_BY_HAND else p).to(tl.bfloat16), mask)


@triton.jit
def adamw_ema_kernel(
    param, grad, exp_avg, exp_avg_sq, ema, bf16_param, step, lr, grad_scale, skip, n,
    beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, weight_decay,
    ema_decay, one_minus_ema_decay, BLOCK: tl.constexpr, WRITE_BF16: tl.constexpr,
):  # fmt: skip
    """The update of BLOCK elements, unless `skip` is not zero. Every program but the last goes without a mask."""
    t, rate, scale = tl.load(step).to(tl.float32), tl.load(lr).to(tl.float32), tl.load(grad_scale).to(tl.float32)  # []
    if tl.load(skip) == 0:  # []
        start = tl.program_id(0).to(tl.int64) * BLOCK
        offsets = tl.arange(0, BLOCK)  # [BLOCK]
        if start + BLOCK <= n:
            _update(
                param=param + start, grad=grad + start, exp_avg=exp_avg + start, exp_avg_sq=exp_avg_sq + start,
                ema=ema + start, bf16_param=bf16_param + start, offsets=offsets, mask=None,
                step=t, lr=rate, grad_scale=scale, beta1=beta1, one_minus_beta1=one_minus_beta1, log_beta1=log_beta1,
                beta2=beta2, one_minus_beta2=one_minus_beta2, log_beta2=log_beta2, eps=eps, weight_decay=weight_decay,
                ema_decay=ema_decay, one_minus_ema_decay=one_minus_ema_decay, WRITE_BF16=WRITE_BF16,
            )  # fmt: skip
        else:
            _update(
                param=param + start, grad=grad + start, exp_avg=exp_avg + start, exp_avg_sq=exp_avg_sq + start,
                ema=ema + start, bf16_param=bf16_param + start, offsets=offsets, mask=start + offsets < n,
                step=t, lr=rate, grad_scale=scale, beta1=beta1, one_minus_beta1=one_minus_beta1, log_beta1=log_beta1,
                beta2=beta2, one_minus_beta2=one_minus_beta2, log_beta2=log_beta2, eps=eps, weight_decay=weight_decay,
                ema_decay=ema_decay, one_minus_ema_decay=one_minus_ema_decay, WRITE_BF16=WRITE_BF16,
            )  # fmt: skip


def update(
    param, grad, exp_avg, exp_avg_sq, ema, bf16_param, step, lr, grad_scale, skip, beta1, beta2, eps, weight_decay,
    ema_decay,
) -> None:  # fmt: skip
    n = param.numel()
    config = launch_config(n)
    launch(
        adamw_ema_kernel,
        (triton.cdiv(n, config.elements),),
        *(param, grad, exp_avg, exp_avg_sq, ema, param if bf16_param is None else bf16_param),
        *(step, lr, grad_scale, skip, n),
        *(beta1, 1 - beta1, log(beta1) if beta1 else -inf),
        *(beta2, 1 - beta2, log(beta2) if beta2 else -inf),
        *(eps, weight_decay, ema_decay, 1 - ema_decay),
        BLOCK=config.elements,
        WRITE_BF16=bf16_param is not None,
        num_warps=config.warps,
    )


adamw_ema_ = register_op("adamw_ema_", update)
unsupported = partial(reasons, unsupported_reasons)

BACKEND = backend(
    adamw_ema_,
    unsupported,
    torch_ops=("ldit::adamw_ema_",),
    configs={"update": launch_config(84_407_092)},
    dtypes=DTYPES,
)
