"""Without a CUDA device Triton's kernels run in its interpreter; that has to be said before Triton is imported."""

import os

from kernels.device import cuda_reasons

if cuda_reasons():
    os.environ.setdefault("TRITON_INTERPRET", "1")
