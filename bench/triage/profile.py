"""A child that makes one call of an op's representative case in bfloat16 between the marks of a profiler.

ncu --profile-from-start off python -m bench.triage.profile OP BACKEND forward|backward
"""

import argparse
import sys

import torch

import kernels
from bench.baselines import Adapter
from bench.measure.work import Call
from bench.ops import representative
from kernels.testing.tolerance import upstream_gradients

WARM_UP = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.triage.profile", description=__doc__)
    parser.add_argument("op", choices=kernels.OPS)
    parser.add_argument("backend")
    parser.add_argument("direction", choices=("forward", "backward"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    op = kernels.OPS[options.op]
    case = next(case for case in op.cases if case.id == representative(op))
    call = Call(op, Adapter(op.bind(op.backend(options.backend))), case.inputs(torch.bfloat16, options.device))
    upstream = upstream_gradients(op, call.results())
    for number in range(WARM_UP + 1):
        marked = number == WARM_UP
        results = None if marked and options.direction == "forward" else call.results()
        torch.cuda.synchronize()
        if marked:
            torch.cuda.profiler.start()
        if results is None:
            call.results()
        elif options.direction == "backward":
            call.gradients(results, upstream)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
