"""The kernel of `adaln_rms_norm_jvp` and `gated_residual_adaln_rms_norm_jvp`.

An argument that is None leaves its code out. A name that ends in `_t` is the tangent of the one before. With
r = rsqrt(mean(x'²) + eps), x̂ = x'·r and gain = weight·(1 + scale), the mean over the D channels of a token:

    x' = x + gate·(branch + bias)     x'_t = x_t + gate_t·(branch + bias) + gate·branch_t
    y  = x̂·gain + shift               y_t  = r·(x'_t − x̂·mean(x̂·x'_t))·gain + x̂·weight·scale_t + shift_t

A program takes one chunk of a sample's tokens, as those of `kernels.adaln_rms_norm` do; shapes are explained there.
"""

import triton
import triton.language as tl

from kernels.adaln_rms_norm.triton_kernels import load, row_of, store


@triton.jit
def modulated_norm_jvp_fwd(
    x, x_t, branch, branch_t, gate, gate_t, bias, weight, shift, shift_t, scale, scale_t, x_new, x_new_t, y, y_t, rstd,
    tokens, chunks, chunk_tokens,
    gate_stride, gate_t_stride, shift_stride, shift_t_stride, scale_stride, scale_t_stride, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """x' where there is a branch, y, and their tangents; and r, which the backward pass needs."""
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    scale, scale_t = row_of(scale, sample, scale_stride), row_of(scale_t, sample, scale_t_stride)
    if gate is not None:
        gate, gate_t = row_of(gate, sample, gate_stride), row_of(gate_t, sample, gate_t_stride)
    if shift is not None:
        shift, shift_t = row_of(shift, sample, shift_stride), row_of(shift_t, sample, shift_t_stride)
    columns, gates, gates_t, biases, gains, gains_t, shifts, shifts_t, start = (), (), (), (), (), (), (), (), 0
    for i in tl.static_range(len(BLOCK_D)):
        cols = start + tl.arange(0, BLOCK_D[i])  # [BLOCK_D]
        columns += (cols,)
        weights = load(weight, cols, D)  # [BLOCK_D]
        gains += (weights * (1 + load(scale, cols, D)),)  # [BLOCK_D]
        gains_t += (weights * load(scale_t, cols, D),)  # [BLOCK_D]
        if gate is not None:
            gates += (load(gate, cols, D),)  # [BLOCK_D]
            gates_t += (load(gate_t, cols, D),)  # [BLOCK_D]
        if bias is not None:
            biases += (load(bias, cols, D),)  # [BLOCK_D]
        if shift is not None:
            shifts += (load(shift, cols, D),)  # [BLOCK_D]
            shifts_t += (load(shift_t, cols, D),)  # [BLOCK_D]
        start += BLOCK_D[i]

    first = chunk * chunk_tokens
    for token in tl.range(first, tl.minimum(first + chunk_tokens, tokens), num_stages=NUM_STAGES):
        offset = (sample.to(tl.int64) * tokens + token) * D
        # x' and its tangent, Σ x'² and Σ x'·x'_t over the token
        values, values_t, squares, dot = (), (), 0.0, 0.0
        for i in tl.static_range(len(BLOCK_D)):
            value = load(x + offset, columns[i], D)  # [BLOCK_D]
            value_t = load(x_t + offset, columns[i], D)  # [BLOCK_D]
            if branch is not None:
                added = load(branch + offset, columns[i], D)  # [BLOCK_D]
                added_t = load(branch_t + offset, columns[i], D)  # [BLOCK_D]
                if bias is not None:
                    added += biases[i]
                # The norm sees both as they are returned, rounded to the dtype of the stream.
                rounded = (value + gates[i] * added).to(x_new.dtype.element_ty)  # [BLOCK_D]
                value_t += gates_t[i] * added + gates[i] * added_t  # [BLOCK_D]
                rounded_t = value_t.to(x_new_t.dtype.element_ty)  # [BLOCK_D]
                store(x_new + offset, columns[i], rounded, D)
                store(x_new_t + offset, columns[i], rounded_t, D)
                value, value_t = rounded.to(tl.float32), rounded_t.to(tl.float32)  # [BLOCK_D]
            squares += tl.sum(value * value)  # []
            dot += tl.sum(value * value_t)  # []
            values += (value,)
            values_t += (value_t,)
        # x̂ = x'·r, and mean(x̂·x'_t) = Σ x'·x'_t · r / D
        r = tl.rsqrt(squares / D + eps)  # []
        mean = dot * r / D  # []
        tl.store(rstd + sample.to(tl.int64) * tokens + token, r)
        for i in tl.static_range(len(BLOCK_D)):
            x_hat = values[i] * r  # [BLOCK_D]
            result = x_hat * gains[i]  # [BLOCK_D]
            result_t = r * (values_t[i] - x_hat * mean) * gains[i] + x_hat * gains_t[i]  # [BLOCK_D]
            if shift is not None:
                result += shifts[i]
                result_t += shifts_t[i]
            store(y + offset, columns[i], result, D)
            store(y_t + offset, columns[i], result_t, D)
