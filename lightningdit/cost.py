"""FLOPs and activation memory of a LightningDiT per image, computed from its config."""

from kernels.compile.recompute import recomputes
from lightningdit.config import ModelConfig, TransportConfig


def flops_per_image(config: ModelConfig) -> tuple[int, int]:
    """(forward, training) FLOPs of one image: every matrix product, a multiply-add counted as two.

    Training is three times the forward: the backward has twice its FLOPs. Recomputation under `use_checkpoint` is not
    counted, as it should not raise a utilisation. LightningDiT-XL/1 on 16 × 16 × 32 latents: 237.25 and 711.76 GFLOP.
    """
    N, D, M = config.num_tokens, config.hidden_size, config.mlp_hidden
    patch = config.patch_size**2
    feed_forward = D * M * (3 if config.use_swiglu else 2)
    per_token = 4 * D * D + feed_forward + 2 * N * D  # projections, feed-forward, attention's two products
    per_block = N * per_token + config.modulation_parts * D * D
    ends = N * D * patch * (config.in_channels + config.out_channels)
    times = 2 if config.time_pairs else 1
    condition = times * (256 * D + D * D) + 2 * D * D  # timestep networks, final modulation
    forward = 2 * (config.depth * per_block + ends + condition)
    return forward, 3 * forward


def training_flops_per_image(config: ModelConfig, transport: TransportConfig) -> float:
    """FLOPs of a training step of one image, by the objective of a `transport` section.

    Average velocities add to the forward pass and its gradients the tangent of samples with two times, a forward pass
    with two more products in attention, and the evaluations without gradients that guidance and improved MeanFlow take
    (`lightningdit.meanflow`). XL/1, in units of flow matching:
    MeanFlow 1.09, guided 1.42; improved MeanFlow with half of the times equal 1.34, guided 1.84; 2.01 with none equal.
    """
    forward, training = flops_per_image(config)
    if transport.objective == "flow":
        return training
    paired = 1 - transport.equal_times
    tangent = forward + 4 * config.depth * config.num_tokens**2 * config.hidden_size
    improved, guided = transport.objective == "improved_meanflow", transport.guidance_scale != 1
    if guided:
        evaluations = 2.0 if improved or transport.guidance_mix else 1.0
    else:
        evaluations = paired if improved else 0.0
    return training + paired * tangent + evaluations * forward


def sampling_flops_per_image(config: ModelConfig, nfe: int, guided_nfe: int, guide: ModelConfig | None = None) -> int:
    """FLOPs of one sample of `nfe` solver calls, `guided_nfe` of them with a second evaluation: counts of `Samples`.

    guide: the network of the second evaluations; None for the same one with the null label.
    """
    return nfe * flops_per_image(config)[0] + guided_nfe * flops_per_image(guide or config)[0]


def activation_bytes_per_image(config: ModelConfig, *, weight_bytes: int = 2, residual_bytes: int = 4) -> int:
    """Bytes that the blocks keep for the backward pass, per image, with ops that save their inputs.

    weight_bytes: size of the computing dtype (2 for bfloat16). residual_bytes: of the residual stream.
    Under `use_checkpoint`, the inputs of the checkpointed blocks, all that the others keep, and the activations of one
    checkpointed block where the last is one; under "pointwise", the inputs and the matrix products of all.
    LightningDiT-XL/1 on 16 × 16 × 32 latents: 330 MB; 220 MB under "pointwise", 175 MB with 2, 61 MB with true.
    """
    N, D, depth, kind = config.num_tokens, config.hidden_size, config.depth, config.use_checkpoint
    if kind == "pointwise":  # the stream between both branches is recomputed too
        return depth * N * (D * residual_bytes + weight_bytes * _products(config))
    per_block = _block_bytes(config, weight_bytes, residual_bytes)
    checkpointed = sum(recomputes(kind, block) for block in range(depth))
    stream = residual_bytes if kind is True else residual_bytes / max(checkpointed, 1)  # else the block before keeps it
    inputs = checkpointed * N * D * (stream + weight_bytes)
    last = per_block if recomputes(kind, depth - 1) else 0
    return round(inputs + (depth - checkpointed) * per_block + last)


def peak_bytes_per_image(
    config: ModelConfig, *, weight_bytes: int = 2, residual_bytes: int = 4, whole_graph: bool = False
) -> int:
    """Bytes per image at the peak of a training step, beside weights and states: what the blocks keep, and the rest.

    The rest is what the ends of the network keep and the gradients on their way: 4.1 MB for XL/1. whole_graph: the
    network is one compiled graph (`train.compile` inductor), which keeps with the inputs of checkpointed blocks the
    norms made in the same pass. Agrees within 2 % with the peaks of compiled steps that the tests hold.
    """
    stream = config.num_tokens * config.hidden_size
    kept = activation_bytes_per_image(config, weight_bytes=weight_bytes, residual_bytes=residual_bytes)
    kind = config.use_checkpoint
    ends = stream * (2 * residual_bytes + 3 * weight_bytes)
    if kind == "pointwise":  # those of one block are computed again
        ends += config.num_tokens * (weight_bytes * _pointwise(config) + config.hidden_size * residual_bytes)
    beside = 0
    if whole_graph and (kind == "pointwise" or kind is True):
        beside = config.depth * stream * weight_bytes
    elif whole_graph and kind:  # the branch that follows a checkpointed block is computed again with it
        checkpointed = sum(recomputes(kind, block) for block in range(config.depth))
        beside = stream * (residual_bytes - checkpointed * weight_bytes)
    return kept + ends + beside


def forward_bytes_per_image(config: ModelConfig, *, weight_bytes: int = 2, residual_bytes: int = 4) -> int:
    """Bytes per image of a forward pass that keeps nothing, at most: the activations of one block, in and out."""
    return _block_bytes(config, weight_bytes, residual_bytes)


def _products(config: ModelConfig) -> int:
    """Numbers per token of a block's matrix products: packed q, k, v; attention's output; branches; SwiGLU's input."""
    return 6 * config.hidden_size + config.mlp_hidden * (2 if config.use_swiglu else 1)


def _pointwise(config: ModelConfig) -> int:
    """Numbers per token between a block's products: outputs of both norms and of the activation."""
    return 2 * config.hidden_size + config.mlp_hidden


def _block_bytes(config: ModelConfig, weight_bytes: int, residual_bytes: int) -> int:
    stream = 2 * config.hidden_size * residual_bytes
    return config.num_tokens * (stream + weight_bytes * (_products(config) + _pointwise(config)))
