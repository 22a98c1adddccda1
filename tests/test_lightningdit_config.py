"""Configuration: published keys and defaults, strict types, names suggested, impossible shapes refused; costs."""

import pytest
import torch
import yaml
from pydantic import ValidationError

from lightningdit.config import (
    MODEL_NAMES,
    SIZES,
    DataConfig,
    ModelConfig,
    ModelSection,
    SampleConfig,
    TransportConfig,
    named_config,
)
from lightningdit.cost import activation_bytes_per_image, flops_per_image
from lightningdit.model import LightningDiT
from tests.published import LIGHTNINGDIT_YAML

PAPER = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
LATENT = dict(input_size=16, in_channels=32)

PUBLISHED = yaml.safe_load(LIGHTNINGDIT_YAML)
# The sections that this library reads.
SECTIONS = {"data": DataConfig, "model": ModelSection, "transport": TransportConfig, "sample": SampleConfig}


def test_published_sections_load():
    assert isinstance(PUBLISHED["sample"]["atol"], str)  # YAML 1.1 wants 1.0e-6
    for name, section in SECTIONS.items():
        assert section(**PUBLISHED[name]).model_dump(include=set(PUBLISHED[name])) == pytest.approx(
            PUBLISHED[name] | ({"atol": 1e-6, "rtol": 1e-3} if name == "sample" else {})
        )
    model = ModelSection(**PUBLISHED["model"]).resolve(input_size=16, num_classes=1000)
    assert model == named_config("LightningDiT-XL/1", **LATENT, **PAPER)


def test_constructor_defaults():
    config = ModelConfig()
    assert (config.hidden_size, config.depth, config.num_heads, config.patch_size) == (1152, 28, 16, 2)
    assert (config.class_dropout_prob, config.num_classes, config.mlp_ratio) == (0.1, 1000, 4.0)
    flags = [v for k, v in config.model_dump().items() if k.startswith("use_") or k in ("wo_shift", "learn_sigma")]
    assert len(flags) == 7 and not any(flags)
    assert ModelSection(model_type="LightningDiT-B/2").in_chans == 4


def test_every_size_at_both_patches():
    assert len(MODEL_NAMES) == 2 * len(SIZES) == 12
    widths = {"B": 2048, "L": 2730, "XL": 3072, "1p0B": 4096, "1p6B": 4778}
    for size, width in widths.items():
        assert named_config(f"LightningDiT-{size}/1", **LATENT, **PAPER).mlp_hidden == width
    assert named_config("LightningDiT-S/2").hidden_size == 384
    message = r"'LightningDiT-XL/3' \(did you mean 'LightningDiT-XL/[12]'\?\); known: .*1p6B/2"
    with pytest.raises(ValueError, match=message):
        named_config("LightningDiT-XL/3")
    with pytest.raises(ValueError, match="hidden_size: already fixed by the name"):
        named_config("LightningDiT-XL/1", hidden_size=8)


MEAN = {"objective": "meanflow"}


@pytest.mark.parametrize(
    "section, values, message",
    [
        (ModelConfig, {"use_rop": True}, r"'use_rop' \(did you mean 'use_rope'\?\)"),
        (ModelConfig, {"depth": "28"}, "depth"),
        (ModelConfig, {"depth": 28.0}, "depth"),
        (ModelConfig, {"depth": True}, "depth"),
        (ModelConfig, {"use_rope": 1}, "use_rope"),
        (ModelConfig, {"depth": 0}, "depth"),
        (ModelConfig, {"mlp_ratio": "4"}, "mlp_ratio"),
        (ModelConfig, {"mlp_ratio": float("nan")}, "mlp_ratio"),
        (ModelConfig, {"input_size": 15}, "input_size 15 is not a multiple of patch_size 2"),
        (ModelConfig, {"input_size": 1024, "patch_size": 1}, "1,048,576 tokens of hidden_size 1152"),
        (ModelConfig, {"num_heads": 7}, "hidden_size 1152 is not a multiple of num_heads 7"),
        (ModelConfig, {"hidden_size": 30, "num_heads": 5, "use_rope": True}, "multiple of 4"),
        (ModelConfig, {"hidden_size": 36, "num_heads": 6, "use_rope": True}, "= 6 is not a multiple of 4"),
        (ModelConfig, {"class_dropout_prob": 1.0}, "class_dropout_prob"),
        (ModelSection, {}, "give model_type"),
        (ModelSection, {"hidden_size": 64, "depth": 2}, "also num_heads, patch_size"),
        (ModelSection, {"model_type": "LightningDit-XL/1"}, "did you mean 'LightningDiT-XL/1'"),
        (ModelSection, {"model_type": "LightningDiT-XL/1", "depth": 4}, "depth: already fixed"),
        (TransportConfig, {"path_type": "linear"}, "'Linear', 'GVP' or 'VP'"),
        (TransportConfig, {"loss_weight": "likelihood"}, "loss_weight 'likelihood' applies to noise and score"),
        (TransportConfig, {"prediction": "noise", "use_cosine_loss": True}, "use_cosine_loss needs prediction"),
        (TransportConfig, {"lognorm_until_step": 10}, "lognorm_until_step needs use_lognorm"),
        (TransportConfig, {"lognorm_mean": 0.4}, "lognorm_mean and lognorm_std need use_lognorm"),
        (TransportConfig, {"objective": "mean_flow"}, "'flow', 'meanflow' or 'improved_meanflow'"),
        (TransportConfig, {"equal_times": 0.5}, "equal_times 0.5: of average velocities, but objective is flow"),
        (TransportConfig, MEAN | {"prediction": "noise"}, "objective meanflow needs prediction velocity, not 'noise'"),
        (TransportConfig, MEAN | {"use_cosine_loss": True}, "use_cosine_loss true is of objective flow"),
        (TransportConfig, MEAN | {"path_type": "VP"}, "objective meanflow needs path_type Linear or GVP"),
        (TransportConfig, MEAN | {"guidance_mix": 0.5}, "guidance_mix 0.5 is of guidance, but guidance_scale"),
        (
            TransportConfig,
            MEAN | {"guidance_scale": 2, "guidance_start": 0.5, "guidance_end": 0.4},
            "guidance_end 0.4 lies below guidance_start 0.5",
        ),
        (
            TransportConfig,
            {"objective": "improved_meanflow", "guidance_scale": 2, "guidance_mix": 0.5},
            "guidance_mix is of objective meanflow",
        ),
        (SampleConfig, {"mode": "meanflow", "cfg_scale": 2}, "cfg_scale is 2, but mode meanflow"),
        (SampleConfig, {"mode": "meanflow", "mean_steps": 0}, "mean_steps"),
        (SampleConfig, {"sampling_method": "dopri8"}, "did you mean 'dopri5'"),
        (SampleConfig, {"mode": "SDE", "sampling_method": "dopri5"}, "SDE has euler, heun"),
        (SampleConfig, {"diffusion_form": "sbdm"}, "SBDM"),
        (SampleConfig, {"num_sampling_steps": 1}, "num_sampling_steps"),
        (SampleConfig, {"likelihood": True}, "likelihood needs mode ODE and cfg_scale 1, not ODE and 4"),
        (SampleConfig, {"likelihood": True, "mode": "SDE", "cfg_scale": 1}, "not SDE and 1"),
        (SampleConfig, {"cfg_scale": 0.5}, "cfg_scale"),
        (DataConfig, {}, "data_path"),
        (DataConfig, {"data_path": "x", "latent_multiplier": 0}, "latent_multiplier"),
    ],
)
def test_wrong_values_are_named(section, values, message):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        section(**values)


def test_whole_numbers_and_dotless_exponents_are_floats():
    assert SampleConfig(cfg_scale=4).cfg_scale == 4.0
    assert SampleConfig(atol="1e-5").atol == 1e-5
    assert ModelConfig(mlp_ratio=3).mlp_hidden == 3456


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().depth = 3


def test_custom_model():
    section = ModelSection(hidden_size=192, depth=8, num_heads=6, patch_size=2, in_chans=8, class_dropout_prob=0.0)
    config = section.resolve(input_size=8, num_classes=10)
    assert (config.num_tokens, config.head_dim, config.null_label) == (16, 32, None)
    assert section.model_copy(update={"class_dropout_prob": 0.1}).resolve(8, 10).null_label == 10


def test_flops_of_the_published_model():
    forward, training = flops_per_image(named_config("LightningDiT-XL/1", **LATENT, **PAPER))
    assert round(forward / 1e9, 2) == 237.25 and round(training / 1e9, 2) == 711.76


@pytest.mark.parametrize("flags", [PAPER, {}, PAPER | {"wo_shift": True}, PAPER | {"learn_sigma": True}])
def test_flops_are_those_torch_counts(flags):
    from torch.utils.flop_counter import FlopCounterMode

    import kernels

    config = ModelConfig(input_size=8, patch_size=2, hidden_size=48, depth=3, num_heads=4, num_classes=5, **flags)
    model = LightningDiT(config, kernels.select("reference"))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert counter.get_total_flops() == 2 * flops_per_image(config)[0]


def saving_inputs(op, count):
    """The op as a function whose backward keeps its first `count` inputs and nothing else."""

    def forward(ctx, *args):
        ctx.save_for_backward(*args[:count])
        return op(*args)

    return type("Saving", (torch.autograd.Function,), {"forward": staticmethod(forward)}).apply


@pytest.mark.parametrize("swiglu", [True, False])
def test_activation_bytes_are_those_autograd_keeps(swiglu):
    """Bytes kept by a model of ops that save their inputs, without what grows with the batch alone (modulation)."""
    from types import SimpleNamespace

    import kernels

    reference = kernels.select("reference")
    eps = 1e-6
    first = saving_inputs(lambda x, w, a, b: reference.adaln_rms_norm(x, w, a, b, eps, out_dtype=torch.bfloat16), 1)

    def gated(x, branch, gate, weight, shift, scale):
        return reference.gated_residual_adaln_rms_norm(x, branch, gate, weight, shift, scale, eps)

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, branch, *rest):
            out = gated(x, branch, *rest)
            ctx.save_for_backward(out[0], branch)
            return out

    # Biases are left out: no activation is kept for them.
    activate = saving_inputs(reference.swiglu, 1)
    attend = saving_inputs(lambda qkv, cos, sin: reference.rope_attention(qkv, cos, sin), 1)
    ops = SimpleNamespace(
        adaln_rms_norm=lambda x, w, a, b, eps, out_dtype: first(x, w, a, b),
        gated_residual_adaln_rms_norm=lambda *args, branch_bias: Gated.apply(*args[:-1]),
        swiglu=lambda gate_up, bias: activate(gate_up),
        rope_attention=lambda qkv, cos, sin, q, k, eps, bias: attend(qkv, cos, sin),
        stacked_linear=kernels.select("auto").stacked_linear,
    )
    flags = PAPER | {"use_swiglu": swiglu}
    config = ModelConfig(input_size=16, patch_size=1, hidden_size=64, depth=24, num_heads=4, num_classes=5, **flags)
    model = LightningDiT(config, ops).bfloat16()
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.numel() >= config.num_tokens * config.hidden_size and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address from reuse
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 1]))
    measured = sum(size for size, _ in kept.values()) / 2
    # The patches and the final layer are left out of the estimate.
    assert activation_bytes_per_image(config) == pytest.approx(measured, rel=0.02)


def test_activation_bytes_of_the_published_model():
    config = named_config("LightningDiT-XL/1", **LATENT, **PAPER)
    pointwise, blocks = (config.model_copy(update={"use_checkpoint": kind}) for kind in ("pointwise", True))
    assert activation_bytes_per_image(pointwise) == pytest.approx(220e6, rel=0.01)
    assert activation_bytes_per_image(blocks) < activation_bytes_per_image(config) / 4
