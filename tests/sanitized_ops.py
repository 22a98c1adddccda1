"""Run the small cases of ops through the emulation, in the mode that `LIGHTNINGDIT_EMULATION` names.

In float32 or bfloat16, by turns where a case has both: float16 takes the lines and the addresses of bfloat16.

    python -m tests.sanitized_ops OP …      one line for each op; the sanitizer ends the process at its first finding

A process of its own, because a sanitizer has to be there from the start (see `tests.emulated.under`).
"""

import argparse

import torch

import kernels
from kernels.testing import checks

DTYPES = (torch.float32, torch.bfloat16)


def run(op) -> int:
    """The number of cases run, forward and backward."""
    backend, count = op.backend("emulated"), 0
    for case in (case for case in op.cases if not case.production):
        dtypes = [dtype for dtype in DTYPES if dtype in op.dtypes & case.dtypes & backend.dtypes]
        served = [dtype for dtype in dtypes if not backend.unsupported(**case.inputs(dtype, "meta"))]
        if not served:
            continue
        inputs = case.inputs(served[count % len(served)])
        results = checks.outputs(op, op.bind(backend), inputs)
        if op.differentiable:
            checks.gradients(op, op.bind(backend), inputs, checks.upstream_gradients(op, results))
        count += 1
    return count


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m tests.sanitized_ops", description=__doc__.partition("\n")[0])
    parser.add_argument("op", nargs="+", choices=kernels.OPS)
    for name in parser.parse_args().op:
        print(name, run(kernels.OPS[name]), flush=True)
