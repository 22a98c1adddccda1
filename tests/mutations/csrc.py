"""Mistakes in the CUDA kernels."""

from tests.mutations import KernelMistake

MISTAKES = {
    "barrier_before_reading": KernelMistake(
        "adaln_rms_norm", "csrc/common/reduce.h", "    __syncthreads();\n", "",
    ),
    "barrier_before_writing_again": KernelMistake(
        "adaln_rms_norm", "csrc/adaln_rms_norm.cu", "token += steps, round ^= 1", "token += steps",
    ),
    "barrier_of_second_stage": KernelMistake(
        "swiglu", "csrc/common/column_sums.h", "  __syncthreads();\n", "",
    ),
    "shuffle_mask": KernelMistake(
        "adaln_rms_norm", "csrc/common/reduce.h", "__shfl_xor_sync(kFullMask, value, flip, kWarp, site)",
        "__shfl_xor_sync(0xffffu, value, flip, kWarp, site)", "not in its mask",
    ),
    "early_return": KernelMistake(
        "adaln_rms_norm", "csrc/common/norm.h", "  float weight_sum = 0.f, weight",
        "  if (!mine) return;\n  float weight_sum = 0.f, weight", "returned before a barrier",
    ),
    "off_by_one_in_the_last_tile": KernelMistake(
        "swiglu", "csrc/swiglu.cu", "end = min(begin + sizes.rows_per_block, sizes.rows);",
        "end = min(begin + sizes.rows_per_block, sizes.rows - (begin > 0));",
    ),
    "vector_where_rows_are_odd": KernelMistake(
        "swiglu", "csrc/swiglu.cu", "bool divides = row_bytes % bytes == 0;", "bool divides = row_bytes > 16;",
        "misaligned",
    ),
    "last_column_of_each_vector": KernelMistake(
        "adaln_rms_norm", "csrc/common/norm.h", "valid = max(min(int(sizes.width) - column, kColumns), 0);",
        "valid = max(min(int(sizes.width) - column, kColumns - 1), 0);",
    ),
    "dropped_eps": KernelMistake(
        "adaln_rms_norm", "csrc/common/norm.h", " + sizes.eps);", ");",
    ),
    "dropped_term": KernelMistake(
        "adaln_rms_norm", "csrc/adaln_rms_norm.cu", "r * dy * gain[j] - value * projection", "r * dy * gain[j]",
    ),
    "gate_left_out_of_the_branch": KernelMistake(
        "gated_residual_adaln_rms_norm", "csrc/gated_residual_adaln_rms_norm.cu", "d_branch_row.set(j, gate[j] * dx);",
        "d_branch_row.set(j, dx);",
    ),
    "gradient_of_the_stream": KernelMistake(
        "gated_residual_adaln_rms_norm", "csrc/gated_residual_adaln_rms_norm.cu", "float dx = stream[i][j] + ",
        "float dx = ",
    ),
    "bias_left_out_of_the_gate": KernelMistake(
        "gated_residual_adaln_rms_norm", "csrc/common/norm.h", "sums[kSumDxBranch] += bias * sums[kSumDx];",
        "",
    ),
    "gate_of_another_thread": KernelMistake(
        "gated_residual_adaln_rms_norm", "csrc/gated_residual_adaln_rms_norm.cu",
        "store(gates.span((half * kNormThreads + threadIdx.x)",
        "store(gates.span((half * kNormThreads + (threadIdx.x ^ 1))",
    ),
    "dropped_correction_of_the_average": KernelMistake(
        "adamw_ema_", "csrc/adamw_ema.cu", "m * m_scale / ", "m / ",
    ),
    "dropped_eps_of_the_root": KernelMistake(
        "adamw_ema_", "csrc/adamw_ema.cu", "(sqrtf(v * v_scale) + rates.eps)", "sqrtf(v * v_scale)",
    ),
    "last_number": KernelMistake(
        "adamw_ema_", "csrc/adamw_ema.cu", "tail(numbers - at);", "tail(numbers - at - 1);",
    ),
    "step_that_is_skipped": KernelMistake(
        "adamw_ema_", "csrc/adamw_ema.cu", "if (read(scalars.skip) != 0) return;", "",
    ),
    "attention_barrier_after_staging": KernelMistake(
        "rope_attention", "csrc/rope_attention/forward.h", "  wait_copies<0>();\n  __syncthreads();\n",
        "  wait_copies<0>();\n",
    ),
    "attention_barrier_before_scores_are_read": KernelMistake(
        "rope_attention", "csrc/rope_attention/backward.h", "        __syncthreads();\n        finish_queries",
        "        finish_queries",
    ),
    "attention_warp_barrier": KernelMistake(
        "rope_attention", "csrc/rope_attention/gradients.h", "  __syncwarp();\n  store_rows", "  store_rows",
    ),
    "attention_bias_of_another_head": KernelMistake(
        "rope_attention", "csrc/rope_attention/rows.h", "(which - 2) * head.row() + head.first() + column",
        "(which - 2) * head.row() + column",
    ),
    "attention_sums_of_another_group": KernelMistake(
        "rope_attention", "csrc/rope_attention/gradients.h", "(upper ? high : low) +", "(upper ? low : high) +",
    ),
    "attention_bias_of_values_in_their_deltas": KernelMistake(
        "rope_attention", "csrc/rope_attention/backward.h", "vectors.add_bias(out_row, 2, column, -1.f)",
        "vectors.add_bias(out_row, 2, column, 0.f)",
    ),
    "attention_last_key": KernelMistake(
        "rope_attention", "csrc/rope_attention/forward.h", "i % 2 >= remaining)", "i % 2 > remaining)",
    ),
    "attention_swapped_fragment": KernelMistake(
        "rope_attention", "csrc/common/fragments.h",
        "a[0] = word<T>(first[0], first[1]), a[1] = word<T>(first[2], first[3]);",
        "a[1] = word<T>(first[0], first[1]), a[0] = word<T>(first[2], first[3]);",
    ),
    "barrier_before_a_stage_is_filled_again": KernelMistake(
        "vf_loss", "csrc/vf_loss.cu", "    use(step);\n    __syncthreads();\n", "    use(step);\n",
    ),
    "copies_used_before_they_arrive": KernelMistake(
        "vf_loss", "csrc/vf_loss.cu", "wait_copies<1>();", "wait_copies<2>();",
    ),
    "last_position": KernelMistake(
        "vf_loss", "csrc/vf_loss.cu", "min(from.positions - position - column,",
        "min(from.positions - 1 - position - column,",
    ),
    "gradient_along_the_vector": KernelMistake(
        "vf_loss", "csrc/vf_loss.cu", "scales.z -= projection * to_unit * to_unit * scales.sum;", "{}",
    ),
    "earlier_panels": KernelMistake(
        "vf_loss", "csrc/vf_loss.cu", "if (first > 0) sum += partial[at];", "",
    ),
}  # fmt: skip
