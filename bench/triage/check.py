"""A child that checks one backend of an op by the rule of the tests.

    python -m bench.triage.check OP BACKEND --result FILE [--samples N] [--device cpu]

Forward, gradients, and the same bits twice, for the representative case in bfloat16 at a batch that leaves memory
to others, and for two small cases. Each is printed before it begins, so that the log of a crash ends with it.
"""

import argparse
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

import kernels
from bench.measure.rows import machine
from bench.ops import representative
from bench.triage.verdicts import FOUND_WRONG, OK, SKIPPED, WRONG
from common.files import write_json
from kernels.registry import Backend, Op
from kernels.testing import checks
from kernels.testing.cases import Case
from kernels.testing.tolerance import tensors_of

#: Samples of the representative case: five processes check at once.
BATCH = 32
#: Small cases that are taken where an op has them: masked edges, and memory with gaps.
SMALL = ("odd", "strided")
CHECKS = {
    "forward": checks.check_forward,
    "gradients": checks.check_gradients,
    "same bits": checks.check_repeats,
}


def fewer_samples(case: Case, batch: int) -> Case:
    """The case with the first samples of every tensor that has more of them."""

    def make(draw) -> dict[str, Any]:
        inputs = case.make(draw)
        samples = next((t.shape[0] for t in tensors_of(inputs) if t.ndim > 1), 0)

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:batch] if tensor.ndim > 1 and tensor.shape[0] == samples else tensor

        return tree_map_only(torch.Tensor, cut, inputs)

    return replace(case, make=make)


def cases(op: Op, backend: Backend, device: str, samples: int) -> Iterator[tuple[Case, torch.dtype]]:
    """The representative case with so many samples (not at 0), and two small ones, as the backend supports them."""

    def reasons(case: Case, dtype: torch.dtype) -> list[str]:
        return backend.unsupported(**case.inputs(dtype, device)) if backend.unsupported is not None else []

    if samples:
        large = fewer_samples(next(case for case in op.cases if case.id == representative(op)), samples)
        if not (found := reasons(large, torch.bfloat16)):
            yield large, torch.bfloat16
        else:
            print(f"{large.id}: not supported: {'; '.join(found)}", flush=True)
    orders = [(torch.float32, torch.float16), (torch.bfloat16 if device == "cuda" else torch.float16, torch.float32)]
    for case in sorted((case for case in op.cases if not case.production), key=lambda case: case.id not in SMALL):
        dtypes = (dtype for dtype in orders[0] if dtype in op.dtypes & case.dtypes & backend.dtypes)
        if (dtype := next((dtype for dtype in dtypes if not reasons(case, dtype)), None)) is not None:
            yield case, dtype
            if not orders[1:]:
                return
            orders.pop(0)


def faults(op: Op, backend: Backend, device: str, samples: int) -> tuple[list[str], int]:
    """The checks that failed, and the number of cases that the backend supports."""
    wrong, count = [], 0
    for case, dtype in cases(op, backend, device, samples):
        count += 1
        for name, check in CHECKS.items():
            if name == "gradients" and not op.differentiable:
                continue
            label = f"{case.id} {str(dtype).removeprefix('torch.')} {name}"
            print(f"{label} …", end=" ", flush=True)
            try:
                check(op, backend, case, dtype, device)
                if device == "cuda":
                    torch.cuda.synchronize()
            except AssertionError as error:
                text = str(error) or traceback.format_exc()
                wrong.append(f"{label}: {text}")
                print(f"wrong: {text}", flush=True)
            else:
                print("right", flush=True)
    return wrong, count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.triage.check", description=__doc__)
    parser.add_argument("op", choices=kernels.OPS)
    parser.add_argument("backend")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=BATCH, help=f"of the large case (default {BATCH}); 0: not it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    op = kernels.OPS[options.op]
    present = options.device == "cpu" or torch.cuda.is_available()
    report: dict[str, Any] = dict(machine(options.device)) if present else {}
    if reasons := op.reasons(options.backend):
        write_json(options.result, report | {"verdict": SKIPPED, "reason": "; ".join(reasons)})
        print("; ".join(reasons))
        return 0
    write_json(options.result, report)
    wrong, count = faults(op, op.backend(options.backend), options.device, options.samples)
    verdict = WRONG if wrong else OK if count else SKIPPED
    reason = "; ".join(wrong) if count else "no case is supported here"
    write_json(options.result, report | {"verdict": verdict, "reason": reason})
    return FOUND_WRONG if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
