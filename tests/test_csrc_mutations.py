"""Kernels of the ops with one mistake put in: the emulated cases have to find each, in some order of the threads."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kernels
from kernels import checks, cuda_launch, emulation
from kernels.emulation import CSRC
from tests.emulated import ORDERS, SOURCES, Library

pytestmark = pytest.mark.skipif(bool(emulation.reasons()), reason="; ".join(emulation.reasons()))


@dataclass(frozen=True)
class Mutation:
    """`old`, found once in `file`, becomes `new`; cases of `op` then fail, with an error that says `report`."""

    op: str
    file: str
    old: str
    new: str
    report: str | None = None


MUTATIONS = {
    "barrier_before_reading": Mutation(
        "adaln_rms_norm", "common/reduce.h", "    __syncthreads();\n", "",
    ),
    "barrier_before_writing_again": Mutation(
        "adaln_rms_norm", "adaln_rms_norm.cu", "token += steps, round ^= 1", "token += steps",
    ),
    "barrier_of_second_stage": Mutation(
        "swiglu", "common/column_sums.h", "  __syncthreads();\n", "",
    ),
    "shuffle_mask": Mutation(
        "adaln_rms_norm", "common/reduce.h", "__shfl_xor_sync(kFullMask, value, flip, kWarp, site)",
        "__shfl_xor_sync(0xffffu, value, flip, kWarp, site)", "not in its mask",
    ),
    "early_return": Mutation(
        "adaln_rms_norm", "common/norm.h", "  float weight_sum = 0.f, weight",
        "  if (!mine) return;\n  float weight_sum = 0.f, weight", "returned before a barrier",
    ),
    "off_by_one_in_the_last_tile": Mutation(
        "swiglu", "swiglu.cu", "end = min(begin + sizes.rows_per_block, sizes.rows);",
        "end = min(begin + sizes.rows_per_block, sizes.rows - (begin > 0));",
    ),
    "vector_where_rows_are_odd": Mutation(
        "swiglu", "swiglu.cu", "bool divides = row_bytes % bytes == 0;", "bool divides = row_bytes > 16;", "misaligned",
    ),
    "last_column_of_each_vector": Mutation(
        "adaln_rms_norm", "common/norm.h", "valid = max(min(int(sizes.width) - column, kColumns), 0);",
        "valid = max(min(int(sizes.width) - column, kColumns - 1), 0);",
    ),
    "dropped_eps": Mutation(
        "adaln_rms_norm", "common/norm.h", " + sizes.eps);", ");",
    ),
    "dropped_term": Mutation(
        "adaln_rms_norm", "adaln_rms_norm.cu", "r * d * factor[j] - value * along", "r * d * factor[j]",
    ),
    "gate_left_out_of_the_branch": Mutation(
        "gated_residual_adaln_rms_norm", "gated_residual_adaln_rms_norm.cu", "of_branch.set(j, gate[j] * total);",
        "of_branch.set(j, total);",
    ),
    "gradient_of_the_stream": Mutation(
        "gated_residual_adaln_rms_norm", "gated_residual_adaln_rms_norm.cu", "float total = stream[i][j] + ",
        "float total = ",
    ),
    "bias_left_out_of_the_gate": Mutation(
        "gated_residual_adaln_rms_norm", "common/norm.h", "sums[kOfStreamTimesBranch] += bias * sums[kOfStream];", "",
    ),
    "gate_of_another_thread": Mutation(
        "gated_residual_adaln_rms_norm", "gated_residual_adaln_rms_norm.cu",
        "store(gates.span((half * kNormThreads + threadIdx.x)",
        "store(gates.span((half * kNormThreads + (threadIdx.x ^ 1))",
    ),
    "dropped_correction_of_the_average": Mutation(
        "adamw_ema_", "adamw_ema.cu", "m * m_scale / ", "m / ",
    ),
    "dropped_eps_of_the_root": Mutation(
        "adamw_ema_", "adamw_ema.cu", "(sqrtf(v * v_scale) + rates.eps)", "sqrtf(v * v_scale)",
    ),
    "last_number": Mutation(
        "adamw_ema_", "adamw_ema.cu", "tail(numbers - at);", "tail(numbers - at - 1);",
    ),
    "step_that_is_skipped": Mutation(
        "adamw_ema_", "adamw_ema.cu", "if (read(scalars.skip) != 0) return;", "",
    ),
    "attention_barrier_after_staging": Mutation(
        "rope_attention", "rope_attention/forward.h", "  wait_copies<0>();\n  __syncthreads();\n",
        "  wait_copies<0>();\n",
    ),
    "attention_barrier_before_scores_are_read": Mutation(
        "rope_attention", "rope_attention/backward.h", "        __syncthreads();\n        finish_queries",
        "        finish_queries",
    ),
    "attention_warp_barrier": Mutation(
        "rope_attention", "rope_attention/gradients.h", "  __syncwarp();\n  store_rows", "  store_rows",
    ),
    "attention_bias_of_another_head": Mutation(
        "rope_attention", "rope_attention/rows.h", "(which - 2) * head.row() + head.first() + column",
        "(which - 2) * head.row() + column",
    ),
    "attention_sums_of_another_group": Mutation(
        "rope_attention", "rope_attention/gradients.h", "(upper ? high : low) +", "(upper ? low : high) +",
    ),
    "attention_bias_of_values_in_their_deltas": Mutation(
        "rope_attention", "rope_attention/backward.h", "vectors.add_bias(result, 2, column, -1.f)",
        "vectors.add_bias(result, 2, column, 0.f)",
    ),
    "attention_last_key": Mutation(
        "rope_attention", "rope_attention/forward.h", "i % 2 >= left)", "i % 2 > left)",
    ),
    "attention_swapped_fragment": Mutation(
        "rope_attention", "common/fragments.h",
        "a[0] = word<T>(first[0], first[1]), a[1] = word<T>(first[2], first[3]);",
        "a[1] = word<T>(first[0], first[1]), a[0] = word<T>(first[2], first[3]);",
    ),
    "barrier_before_a_stage_is_filled_again": Mutation(
        "vf_loss", "vf_loss.cu", "    use(step);\n    __syncthreads();\n", "    use(step);\n",
    ),
    "copies_used_before_they_arrive": Mutation(
        "vf_loss", "vf_loss.cu", "wait_copies<1>();", "wait_copies<2>();",
    ),
    "last_position": Mutation(
        "vf_loss", "vf_loss.cu", "min(from.positions - position - column,",
        "min(from.positions - 1 - position - column,",
    ),
    "gradient_along_the_vector": Mutation(
        "vf_loss", "vf_loss.cu", "scales.of_z -= along * to_unit * to_unit * scales.pull;", "{}",
    ),
    "earlier_panels": Mutation(
        "vf_loss", "vf_loss.cu", "if (first > 0) sum += partial[at];", "",
    ),
}  # fmt: skip


def mutated(mutation: Mutation, folder: Path) -> Path:
    """The library of the module with the mutation in it: only sources of the op that it touches are compiled anew."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    file = copy / mutation.file
    assert file.read_text().count(mutation.old) == 1, f"{mutation.file} holds {mutation.old!r} not once"
    file.write_text(file.read_text().replace(mutation.old, mutation.new))
    sources = sorted(copy.glob(f"{mutation.op.rstrip('_')}*.cu"))
    touched = [source for source in sources if file.resolve() in emulation.included(source, copy)]
    assert touched, f"no source of {mutation.op} includes {mutation.file}"
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


@pytest.mark.parametrize("name", sorted({mutation.op for mutation in MUTATIONS.values()}))
def test_without_a_mutation_nothing_is_found(name):
    run_cases(kernels.OPS[name], emulation.module(), "shuffled")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_found(name, tmp_path, monkeypatch):
    mutation = MUTATIONS[name]
    module = emulation.load(mutated(mutation, tmp_path))
    monkeypatch.setattr(cuda_launch, "launchers", lambda device: module)
    with pytest.raises((AssertionError, RuntimeError), match=mutation.report):
        for order in ORDERS:
            run_cases(kernels.OPS[mutation.op], module, order)


def test_a_swapped_fragment_is_found(tmp_path):
    """Of the matrix product: its second and third register of A, which hold other rows and other k."""
    from tests.test_csrc_helpers import test_mma

    source = tmp_path / "helpers.cu"
    text = (SOURCES / "helpers.cu").read_text()
    assert text.count("left[2 * half + below] =") == 1
    source.write_text(text.replace("left[2 * half + below] =", "left[half + 2 * below] ="))
    shutil.copy(SOURCES / "interface.h", tmp_path)
    library = Library(emulation.library([source]))
    with pytest.raises(AssertionError):
        test_mma(("cpu", library), "float16", 16)
