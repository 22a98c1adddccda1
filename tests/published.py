"""The published run files, key by key as their repository documents them.

`LIGHTNINGDIT_YAML` and `TOKENIZER_YAML` are one file of each model as text (values: the 64-epoch file's); keys that
only some have are apart: `LIGHTNINGDIT_OPTIONAL`, `TOKENIZER_OPTIONAL`. `FILES` holds all nine by name. `TOKENIZERS`
and `STAGES` hold what those of tokenizers became in the runs that were published.
"""

import copy
from typing import Any

import yaml

LIGHTNINGDIT_YAML = """\
ckpt_path: /path/to/lightningdit-xl-imagenet256-64ep.pt
data:
  data_path: /path/to/latents
  fid_reference_file: /path/to/VIRTUAL_imagenet256_labeled.npz
  image_size: 256
  num_classes: 1000
  num_workers: 8
  latent_norm: true
  latent_multiplier: 1.0
vae:
  model_name: vavae_f16d32
  downsample_ratio: 16
model:
  model_type: LightningDiT-XL/1
  use_qknorm: false
  use_swiglu: true
  use_rope: true
  use_rmsnorm: true
  wo_shift: false
  in_chans: 32
train:
  max_steps: 80000
  global_batch_size: 1024
  global_seed: 0
  output_dir: output
  exp_name: null
  ckpt: null
  log_every: 100
  ckpt_every: 20000
optimizer:
  lr: 0.0002
  beta2: 0.95
transport:
  path_type: Linear
  prediction: velocity
  loss_weight: null
  sample_eps: null
  train_eps: null
  use_cosine_loss: true
  use_lognorm: true
sample:
  mode: ODE
  sampling_method: euler
  atol: 1e-6
  rtol: 1e-3
  reverse: false
  likelihood: false
  num_sampling_steps: 250
  cfg_scale: 10.0
  per_proc_batch_size: 4
  fid_num: 50000
  cfg_interval_start: 0.10
  timestep_shift: 0.3
"""

LIGHTNINGDIT_OPTIONAL = """\
data: {valid_path: /path/to/valid}
model: {use_checkpoint: true, learn_sigma: true}
train: {weight_init: /path/to/weights.pt, resume: true, use_checkpoint: true}
optimizer: {max_grad_norm: 1.0}
"""

TOKENIZER_YAML = """\
ckpt_path: /path/to/ckpt
weight_init: null
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    monitor: val/rec_loss
    embed_dim: 32
    use_vf: dinov2
    reverse_proj: true
    lossconfig:
      target: ldm.modules.losses.LPIPSWithDiscriminator
      params:
        disc_start: 5001
        kl_weight: 1.0e-6
        disc_weight: 0.5
        vf_weight: 0.1
        adaptive_vf: true
        distmat_margin: 0.25
        cos_margin: 0.5
    ddconfig:
      double_z: true
      z_channels: 32
      resolution: 256
      in_channels: 3
      out_ch: 3
      ch: 128
      ch_mult: [1, 1, 2, 2, 4]
      num_res_blocks: 2
      attn_resolutions: [16]
      dropout: 0.0
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 8
    wrap: true
    train:
      target: ldm.data.imagenet.ImageNetTrain
      params: {data_root: /path/to/train}
    validation:
      target: ldm.data.imagenet.ImageNetValidation
      params: {data_root: /path/to/val}
lightning:
  trainer:
    devices: 8
    num_nodes: 4
    strategy: ddp_find_unused_parameters_true
    accelerator: gpu
    max_epochs: 50
    precision: 32
"""

TOKENIZER_OPTIONAL = """\
weight_init: /path/to/stage1.ckpt
model: {params: {proj_fix: true}}
"""


def _changed(text: str, **values: Any) -> dict:
    """The document of `text` with values put at dotted keys (`__` for the dot); `...` takes the key away."""
    document = yaml.safe_load(text)
    for dotted, value in values.items():
        *sections, key = dotted.split("__")
        inner = document
        for section in sections:
            inner = inner[section]
        if value is ...:
            del inner[key]
        else:
            inner[key] = copy.deepcopy(value)
    return document


_NAMED = {"train__exp_name": "lightningdit_xl_vavae_f16d32", "sample__atol": 0.000001, "sample__rtol": 0.001}
_LOSS = "model__params__lossconfig__params__"
_NO_VF = {_LOSS + key: ... for key in ("vf_weight", "adaptive_vf", "distmat_margin", "cos_margin")}
_NO_TRAINING = {"weight_init": ..., "data": ..., "lightning": ..., _LOSS + "disc_start": 1}

#: Path in the published repository → document.
FILES: dict[str, dict] = {
    "configs/config_details.yaml": _changed(
        LIGHTNINGDIT_YAML, **_NAMED, sample__cfg_scale=8.0, sample__cfg_interval_start=0.11
    ),
    "configs/lightningdit_xl_vavae_f16d32.yaml": _changed(
        LIGHTNINGDIT_YAML, **_NAMED, sample__cfg_scale=10.0, sample__cfg_interval_start=0.11
    ),
    "configs/reproductions/lightningdit_xl_vavae_f16d32_64ep_cfg.yaml": _changed(
        LIGHTNINGDIT_YAML, **_NAMED, sample__cfg_scale=10.0, sample__cfg_interval_start=0.10
    ),
    "configs/reproductions/lightningdit_xl_vavae_f16d32_800ep_cfg.yaml": _changed(
        LIGHTNINGDIT_YAML, **_NAMED, sample__cfg_scale=6.7, sample__cfg_interval_start=0.125
    ),
    "tokenizer/configs/vavae_f16d32.yaml": _changed(
        TOKENIZER_YAML, **_NO_TRAINING, **{_LOSS + "vf_loss_type": "combined_v3"}
    ),
    "tokenizer/configs/vavae_experimentals.yaml": _changed(TOKENIZER_YAML, **_NO_TRAINING, **_NO_VF),
    "vavae/configs/f16d32_ldm.yaml": _changed(
        TOKENIZER_YAML, weight_init=..., model__params__use_vf=..., model__params__reverse_proj=..., **_NO_VF
    ),
    "vavae/configs/f16d32_vfdinov2.yaml": _changed(TOKENIZER_YAML, weight_init=...),
    "vavae/configs/f16d32_vfdinov2_long.yaml": _changed(
        TOKENIZER_YAML,
        weight_init=...,
        lightning__trainer__max_epochs=None,
        **{_LOSS + key: None for key in ("disc_start", "vf_weight", "distmat_margin", "cos_margin")},
    ),
}


def _tokenizer(channels: int, vf: str | None) -> dict:
    sizes = {"model__params__embed_dim": channels, "model__params__ddconfig__z_channels": channels}
    unaligned = {"model__params__use_vf": ..., "model__params__reverse_proj": ..., **_NO_VF}
    aligned = {"model__params__use_vf": vf}
    return _changed(TOKENIZER_YAML, weight_init=..., **sizes, **(unaligned if vf is None else aligned))


#: (channels, foundation model or None) → the file that trains this f16 tokenizer of the paper's table 2.
TOKENIZERS = {(channels, vf): _tokenizer(channels, vf) for channels in (16, 32, 64) for vf in (None, "mae", "dinov2")}


def _stage(epochs: int, disc_start: int, vf_weight: float, distmat_margin: float, cos_margin: float) -> dict:
    loss = {
        "disc_start": disc_start,
        "vf_weight": vf_weight,
        "distmat_margin": distmat_margin,
        "cos_margin": cos_margin,
    }
    values = {_LOSS + key: value for key, value in loss.items()}
    return _changed(TOKENIZER_YAML, weight_init=..., lightning__trainer__max_epochs=epochs, **values)


#: The three files that `f16d32_vfdinov2_long.yaml` was for the released tokenizer; 2 and 3 start from the weights of
#: the one before, `weight_init`.
STAGES = [_stage(100, 5001, 0.5, 0, 0), _stage(15, 1, 0.1, 0, 0), _stage(15, 1, 0.1, 0.25, 0.5)]


def kind_of(name: str) -> str:
    """Which model the published file of that name is for."""
    return "lightningdit" if name.startswith("configs/") else "vavae"
