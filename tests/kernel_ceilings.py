"""What each Triton kernel may use at most, in every production case, dtype and architecture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceiling:
    """Limits of one kernel.

    Attributes:
        registers: per thread.
        shared: bytes per program.
        wgmma: its sm_90 code multiplies with `wgmma` where the inputs are not float32.
        wide_loads: it reads 128 bits at a time.
        stack: bytes that float32 may spill; in 16 bits nothing may.
        narrow: cases whose rows do not begin at multiples of 16 bytes, so that no load can be that wide.
    """

    registers: int
    shared: int
    wgmma: bool = False
    wide_loads: bool = False
    stack: int = 0
    narrow: tuple[str, ...] = ()


CEILINGS: dict[str, Ceiling] = {
    "adamw_ema_kernel": Ceiling(registers=60, shared=4096, wide_loads=True),
    "swiglu_fwd_kernel": Ceiling(registers=64, shared=0, wide_loads=True, narrow=("L", "L_bias")),
    "swiglu_bwd_kernel": Ceiling(registers=108, shared=4096, wide_loads=True, narrow=("L", "L_bias")),
    "swiglu_sum_kernel": Ceiling(registers=40, shared=512),
    "vf_loss_positions": Ceiling(128, 1024, wide_loads=True),
    "vf_loss_tiles": Ceiling(248, 196608, wgmma=True),
    "vf_loss_means": Ceiling(40, 64),
    "vf_loss_gradient": Ceiling(255, 139264, wgmma=True),
    "modulated_norm_fwd": Ceiling(registers=128, shared=28 * 1024 + 512, wide_loads=True),
    "modulated_norm_bwd": Ceiling(registers=216, shared=56 * 1024 + 512, wide_loads=True),
    "modulation_bwd": Ceiling(registers=128, shared=8192, wide_loads=True),
    "group_norm_silu_statistics": Ceiling(118, 33 * 1024, wide_loads=True),
    "group_norm_silu_apply": Ceiling(64, 33 * 1024),
    "group_norm_silu_sums": Ceiling(128, 65 * 1024),
    "group_norm_silu_gradients": Ceiling(128, 65 * 1024),
    "rope_attention_fwd_resident_kernel": Ceiling(255, 88 * 1024, wgmma=True, wide_loads=True),
    "rope_attention_fwd_kernel": Ceiling(255, 48 * 1024, wgmma=True, wide_loads=True, stack=336),
    "rope_attention_bwd_dq_kernel": Ceiling(255, 98 * 1024, wgmma=True, wide_loads=True, stack=112),
    "rope_attention_bwd_dkdv_kernel": Ceiling(255, 92 * 1024, wgmma=True, wide_loads=True, stack=24),
    "linear_swiglu_kernel": Ceiling(224, 225 * 1024, wgmma=True),
    "swiglu_linear_grad_kernel": Ceiling(255, 225 * 1024, wgmma=True),
    "weight_gradients_kernel": Ceiling(168, 161 * 1024, wgmma=True),
    "weight_gradients_sum_kernel": Ceiling(40, 2048, wide_loads=True),
    "rope_attention_bwd_sums_kernel": Ceiling(40, 256, wide_loads=True),
}  # fmt: skip
