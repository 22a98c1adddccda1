"""Expectations of `adamw_ema_`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import CudaLimits, Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        ("** step.double()", "** (0 * step.double() + 1)"),
        ("(1 - lr.double() * weight_decay)", "(1 - 0 * lr.double() - weight_decay)"),
        ("(1 - lr.double() * weight_decay)", "(1 + 0 * lr.double() * weight_decay)"),
        ("ema_decay) * p", "ema_decay) * param"),
        ("ema_decay * ema", "ema"),
        ("torch.where(skip != 0, tensor, new.to(tensor.dtype))", "new.to(tensor.dtype)"),
        ("torch.where(skip != 0, tensor, new.to(tensor.dtype))", "tensor + skip.logical_not() * (new - tensor)"),
        (" * grad_scale.to(acc_dtype)", ""),
        ("g.square()", "g.abs()"),
        ("(bf16_param, p)", "(bf16_param, e)"),
        (".sqrt() + eps)", ".sqrt())"),
        ("(v * v_scale).sqrt() + eps", "(v * v_scale + eps).sqrt()"),
        ("m * m_scale", "m"),
        ("p = param *", "grad.zero_(); p = param *"),
    ),
    triton_launches=(1, 0),
    triton={
        "adamw_ema_kernel": TritonLimits(registers=60, shared_bytes=4 * 1024, loads_128_bits=True),
    },
    cuda={
        "adamw_ema": CudaLimits(registers=80, instances_loading_128_bits=2),
    },
)
