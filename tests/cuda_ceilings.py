"""What each CUDA kernel may use at most, over all its instances and architectures. None may spill."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceiling:
    """Limits of one kernel.

    Attributes:
        registers: per thread.
        shared: bytes of static shared memory.
        wide_loads: so many of its instances, at least, read 128 bits at a time: those for aligned rows.
        hmma: so many multiply on the tensor cores: those for 16-bit inputs.
    """

    registers: int
    shared: int = 0
    wide_loads: int = 0
    hmma: int = 0


CEILINGS: dict[str, Ceiling] = {
    "swiglu_fwd": Ceiling(registers=72, wide_loads=6),
    "swiglu_bwd": Ceiling(registers=112, wide_loads=6),
    "column_sums": Ceiling(registers=32, shared=1024),
    "adaln_rms_norm_fwd": Ceiling(registers=96, shared=1024, wide_loads=9),
    "adaln_rms_norm_bwd": Ceiling(registers=96, shared=1024, wide_loads=9),
    "gated_residual_adaln_rms_norm_fwd": Ceiling(registers=96, shared=512, wide_loads=5),
    "gated_residual_adaln_rms_norm_bwd": Ceiling(registers=128, shared=17408, wide_loads=5),
    "reduce_modulation": Ceiling(registers=40, shared=2048),
    "adamw_ema": Ceiling(registers=80, wide_loads=2),
    "vf_loss_positions": Ceiling(registers=64, shared=24832, wide_loads=3),
    "vf_loss_tiles": Ceiling(registers=128, shared=37120, wide_loads=3, hmma=2),
    "vf_loss_means": Ceiling(registers=32, shared=512),
    "vf_loss_gradient": Ceiling(registers=224, wide_loads=3, hmma=2),
    "rope_attention_fwd": Ceiling(registers=255, shared=2560, wide_loads=12, hmma=10),
    "rope_attention_bwd": Ceiling(registers=255, shared=3488, wide_loads=12, hmma=10),
}
