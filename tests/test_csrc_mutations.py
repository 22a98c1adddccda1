"""Kernels of the ops with one mistake put in: the emulated cases have to find each, in some order of the threads."""

import shutil
from pathlib import Path

import pytest
import torch

import kernels
from kernels.backends import cuda_launch
from kernels.testing import checks, emulation
from kernels.testing.emulation import CSRC
from tests.emulated import ORDERS, SOURCES, Library
from tests.mutations import KernelMistake, mutated
from tests.mutations.csrc import MISTAKES

pytestmark = pytest.mark.skipif(bool(emulation.reasons()), reason="; ".join(emulation.reasons()))


def library(mistake: KernelMistake, folder: Path) -> Path:
    """The library of the module with the mistake in it: only sources of the op that it touches are compiled anew."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    file = folder / mistake.file
    file.write_text(mutated(mistake, folder))
    sources = sorted(copy.glob(f"{mistake.op.rstrip('_')}*.cu"))
    touched = [source for source in sources if file.resolve() in emulation.included(source, copy)]
    assert touched, f"no source of {mistake.op} includes {mistake.file}"
    names = {source.name for source in touched}
    others = [source for source in emulation.module_sources() if source.name not in names]
    return emulation.library(touched, "unoptimized", plain=others)


def cases(op):
    """Small cases that together have tails, several blocks, and columns that fill no vector."""
    found = [case for case in op.cases if not case.production and torch.float32 in case.dtypes]
    served = [case for case in found if not op.backend("emulated").unsupported(**case.inputs(torch.float32, "meta"))]
    return [case for case in served if sum(tensor.numel() for tensor in tensors(case)) < 40_000]


def tensors(case) -> list[torch.Tensor]:
    return [value for value in case.inputs(torch.float32, "meta").values() if isinstance(value, torch.Tensor)]


def run_cases(op, module, order: str) -> None:
    """Raises AssertionError, or the emulation's RuntimeError, where a result of the module is wrong."""
    module.set_order(order, 0)
    for case in cases(op):
        checks.check_forward(op, op.backend("emulated"), case, torch.float32)
        if op.differentiable:
            checks.check_gradients(op, op.backend("emulated"), case, torch.float32)


@pytest.mark.parametrize("name", sorted({mistake.op for mistake in MISTAKES.values()}))
def test_without_a_mutation_nothing_is_found(name):
    run_cases(kernels.OPS[name], emulation.module(), "shuffled")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mutation_is_found(name, tmp_path, monkeypatch):
    mistake = MISTAKES[name]
    module = emulation.load(library(mistake, tmp_path))
    monkeypatch.setattr(cuda_launch, "launchers", lambda device: module)
    with pytest.raises((AssertionError, RuntimeError), match=mistake.report):
        for order in ORDERS:
            run_cases(kernels.OPS[mistake.op], module, order)


def test_a_swapped_fragment_is_found(tmp_path):
    """Of the matrix product: its second and third register of A, which hold other rows and other k."""
    from tests.test_csrc_helpers import test_mma

    source = tmp_path / "helpers.cu"
    text = (SOURCES / "helpers.cu").read_text()
    assert text.count("a_frag[2 * half + below] =") == 1
    source.write_text(text.replace("a_frag[2 * half + below] =", "a_frag[half + 2 * below] ="))
    shutil.copy(SOURCES / "interface.h", tmp_path)
    library = Library(emulation.library([source]))
    with pytest.raises(AssertionError):
        test_mma(("cpu", library), "float16", 16)
