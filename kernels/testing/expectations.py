"""The types of `kernels/<op>/expectations.py`, which holds an op's `EXPECTATIONS` for the tests.

Nothing at run time reads these files: `Op.expectations` imports one where a test or a bench asks for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TritonLimits:
    """Upper limits for a Triton kernel, in every production case, dtype and architecture.

    Attributes:
        registers: per thread.
        shared_bytes: shared memory of a program.
        wgmma: its sm_90 code multiplies with `wgmma` where the inputs are not float32.
        loads_128_bits: it reads 128 bits at a time.
        float32_spills: bytes of registers that it may spill where the inputs are float32; in 16 bits none may.
        unaligned_cases: ids of cases whose rows do not begin at multiples of 16 bytes, where no load can be that wide.
    """

    registers: int
    shared_bytes: int
    wgmma: bool = False
    loads_128_bits: bool = False
    float32_spills: int = 0
    unaligned_cases: tuple[str, ...] = ()


@dataclass(frozen=True)
class CudaLimits:
    """Upper limits for a CUDA kernel, over all its instances and architectures. None may spill.

    Attributes:
        registers: per thread.
        shared_bytes: static shared memory of a block.
        instances_loading_128_bits: so many of its instances, at least, do: those for aligned rows.
        instances_with_mma: so many, at least, multiply on the tensor cores: those for 16-bit inputs.
    """

    registers: int
    shared_bytes: int = 0
    instances_loading_128_bits: int = 0
    instances_with_mma: int = 0


@dataclass(frozen=True)
class Expectations:
    """Of one op.

    Attributes:
        wrong_edits: (text, replacement) of `reference.py`, each text found there once. With any of these edits it is
            wrong, and the op's cases have to find that.
        triton_launches: kernels that one call launches at a production shape, forward and backward; None without a
            Triton backend.
        triton: Triton kernel → its limits; all kernels that the production cases launch.
        cuda: CUDA kernel → its limits. Kernels that several ops launch have the same limits in each.
        rounded_once: whether 16-bit results of the reference are those of float32 arithmetic, rounded once. Not so
            where the reference is a matrix product of the library, which adds up in an order of its own.
        float32_results: whether results are float32 whatever the dtype of the inputs.
    """

    wrong_edits: tuple[tuple[str, str], ...]
    triton_launches: tuple[int, int] | None = None
    triton: Mapping[str, TritonLimits] = field(default_factory=dict)
    cuda: Mapping[str, CudaLimits] = field(default_factory=dict)
    rounded_once: bool = True
    float32_results: bool = False
