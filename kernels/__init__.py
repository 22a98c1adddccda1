"""Operations with interchangeable backends: one folder per op, one file per backend.

    ops = kernels.select("auto")                           # per op, the first backend that can serve here
    ops = kernels.select("reference")                      # plain PyTorch everywhere
    ops = kernels.select("auto", swiglu="cuda")            # one op by name

The docstring of `kernels.<op>` says what the op computes. A new op is one line here.
"""

from kernels.registry import Backend, BackendUnavailable, Op, Ops, choose, load_ops

# A public package has the same name. Programs here look for the first line (`launch.runtime.packages`); libraries
# that can use the public package look for the second, and take no version that is so old.
__project__ = "lightningdit"
__version__ = "0"

OPS: dict[str, Op] = load_ops(
    "adaln_rms_norm",
    "gated_residual_adaln_rms_norm",
    "swiglu",
    "rope_attention",
    "vf_loss",
    "group_norm_silu",
    "adamw_ema_",
    "stacked_linear",
    "adaln_rms_norm_jvp",
    "gated_residual_adaln_rms_norm_jvp",
    "swiglu_jvp",
    "rope_attention_jvp",
    "stacked_linear_jvp",
    "linear_swiglu",
    "swiglu_linear_grad",
    "weight_gradients",
)


def select(backend: str = "auto", /, **per_op: str) -> Ops:
    """The ops on one backend, with exceptions by name.

    Args:
        backend: `"reference"`, `"triton"`, `"cuda"`, or `"auto"`: for each op the first backend of its order that can
            serve on this machine, and others with kernels for calls that this one cannot serve. Which ones those are is
            logged, once for each outcome. An op that computes with the library's own products (`"library"`) needs no
            kernels, so it does that too under a name that it lacks.
        per_op: op name → backend name, in place of `backend` for that op.

    Returns:
        An immutable bundle with one callable for each op. An op whose named backend is missing or cannot run here
        raises `BackendUnavailable` when it is called, so a bundle may name a backend that only some ops have.

    Raises:
        ValueError: an unknown backend or op name; the message gives the nearest known one.
        BackendUnavailable: an op in `per_op` that nobody calls (`Op.graph_pass`), whose backend cannot run here.
    """
    return choose(OPS, backend, per_op)


__all__ = ["OPS", "Backend", "BackendUnavailable", "Op", "Ops", "select"]
