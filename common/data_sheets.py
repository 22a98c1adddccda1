"""Data sheets of GPUs: peak rates that their vendors state, each with its source."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sheet:
    """Rates a vendor states: dense (without sparsity), FLOP/s and bytes/s; `source` says where.

    float32: of products in IEEE float32, without tensor cores; None where no sheet at hand states it.
    """

    bfloat16: float
    float8: float | None
    bandwidth: float
    source: str
    float32: float | None = None

    def peak(self, precision: str) -> float | None:
        """FLOP/s of a training precision ("bfloat16" or "float32")."""
        return {"bfloat16": self.bfloat16, "float32": self.float32}[precision]


#: The device's name as its driver gives it → its sheet. Parts of other forms (PCIe, NVL) have other rates.
SHEETS: dict[str, Sheet] = {
    "NVIDIA A100-SXM4-80GB": Sheet(
        312e12, None, 2.039e12,
        "NVIDIA A100 data sheet, SXM 80 GB: bf16 312, fp32 19.5 TFLOP/s dense, no fp8; 2,039 GB/s",
        float32=19.5e12,
    ),
    "NVIDIA H100 80GB HBM3": Sheet(
        989e12, 1979e12, 3.35e12,
        "NVIDIA H100 data sheet, SXM5: bf16 1,979 and fp8 3,958 TFLOP/s with sparsity, half of it dense; 3.35 TB/s; "
        "fp32 67", float32=67e12,
    ),
    "NVIDIA H800": Sheet(
        989e12, 1979e12, 3.35e12,
        "resellers' data sheets of the H800 SXM5 (NVIDIA publishes none): the H100's rates and memory, NVLink 400 GB/s",
        float32=67e12,
    ),
    "NVIDIA H200": Sheet(
        989e12, 1979e12, 4.8e12,
        "NVIDIA H200 data sheet, SXM: bf16 1,979 and fp8 3,958 TFLOP/s with sparsity, half of it dense; 4.8 TB/s; "
        "fp32 67", float32=67e12,
    ),
    "NVIDIA B200": Sheet(
        2250e12, 4500e12, 8.0e12,
        "NVIDIA Blackwell Architecture Technical Brief, HGX B200 at 1,000 W: dense bf16 2.25, fp8 4.5 PFLOP/s; 8 TB/s",
    ),
}  # fmt: skip
