"""Expectations of `vf_loss`: launches, limits of its kernels, wrong edits of the reference."""

from kernels.testing.expectations import CudaLimits, Expectations, TritonLimits

EXPECTATIONS = Expectations(
    wrong_edits=(
        (" - distmat_margin", ""),
        ("1 - cos_margin", "1"),
        ("difference.abs()", "difference"),
        ("cosine_matrix(f)", "cosine_matrix(f.detach())"),
        ("unit(f, 1e-8)", "unit(f.detach(), 1e-8)"),
        ("unit(z, 1e-8)", "unit(z, 1e-12)"),
        ("unit(vectors, 1e-12)", "unit(vectors, 1e-8)"),
        ("difference.abs()", "difference.tril(-1).abs()"),
        ("accumulation_dtype(z, f)", "z.dtype"),
        ("distmat_margin).relu().mean()", "distmat_margin).relu().mean(dim=(0, 1)).sum()"),
        ("(1 - cos_margin - cosine).relu()", "(1 - cos_margin - cosine)"),
        ("return distmat, ", "return distmat * 1, distmat + 0 * "),
    ),
    triton_launches=(3, 2),
    triton={
        "vf_loss_positions": TritonLimits(registers=128, shared_bytes=1024, loads_128_bits=True),
        "vf_loss_tiles": TritonLimits(registers=248, shared_bytes=192 * 1024, wgmma=True),
        "vf_loss_means": TritonLimits(registers=40, shared_bytes=64),
        "vf_loss_gradient": TritonLimits(registers=255, shared_bytes=136 * 1024, wgmma=True),
    },
    cuda={
        "vf_loss_positions": CudaLimits(registers=64, shared_bytes=24832, instances_loading_128_bits=3),
        "vf_loss_tiles": CudaLimits(
            registers=128, shared_bytes=37120, instances_loading_128_bits=3, instances_with_mma=2
        ),
        "vf_loss_means": CudaLimits(registers=32, shared_bytes=512),
        "vf_loss_gradient": CudaLimits(registers=224, instances_loading_128_bits=3, instances_with_mma=2),
    },
    float32_results=True,
)
