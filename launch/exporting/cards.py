"""The model cards of what `export` writes: a pipeline of diffusers, a network, a tokenizer.

The front matter's keys are those of the hub's model cards (library_name, pipeline_tag, license, tags); its list of
tasks has none for images by class, so that of unconditional generation stands there and the tags say more.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import read_json
from launch.config import select_ops
from launch.exporting.card import Card, Result, figures_of, training_facts
from launch.exporting.networks import Network
from launch.trained import build_diffusion
from launch.training.checkpoint import Checkpoint
from lightningdit.config import ModelConfig
from lightningdit.weights import export_paths, read_export
from vavae.diffusers_layout import CONFIG_FILE
from vavae.weights import fingerprint, load_tokenizer

PAPER = "arxiv:2501.01423"  # as the hub's tags name it
GENERATION = "unconditional-image-generation"

_PIPELINE_USE = """\
```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True, dtype=torch.bfloat16).to("cuda")
image = pipe(class_labels=[{label}], generator=torch.Generator("cpu").manual_seed(0)).images[0]
```

`trust_remote_code=True` lets diffusers run `{code}` of this folder, which holds the network and the pipeline and needs
torch and diffusers alone: read it first. In place of `{name}` the path of this folder, or of its repository, is given.
Without further arguments the pipeline takes {num_inference_steps} steps of Euler's method with guidance scale
{guidance_scale:g} ({guidance_schedule}) at times {guidance_start:g} to {guidance_end:g} (0: noise, 1: data), on
{channels} of the latents; `num_inference_steps`, `guidance_scale`, `guidance_interval` and `guidance_channels` are
others."""

_OWN_USE = """\
```sh
python -m launch {program}{name}.safetensors
```

{name}.json beside {name}.safetensors tells its sizes and SHA-256, which is checked when it is read. Tensors have their
published names."""

_FOLDER_USE = """\
```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{name}")
```

Pipelines take latents z as `(z - latents_mean) / latents_std * scaling_factor` of its config.json."""


def pipeline_card(
    name: str,
    network: Network,
    hashes: Mapping[str, str],
    figures: Sequence[Result],
    remarks: Sequence[str],
    license: str | None,
    *,
    code: str,
    settings: Mapping[str, Any],
) -> Card:
    """The card of a pipeline folder. code: its file of ours. settings: of its model_index.json."""
    found = network.found
    channels = "all channels" if settings["guidance_channels"] is None else f"the first {settings['guidance_channels']}"
    label = min(207, found.config.num_classes - 1)
    return Card(
        title=name,
        library="diffusers",
        intro="\n\n".join([_describe(found.config, found.weights), *remarks]),
        use=_PIPELINE_USE.format(name=name, label=label, code=code, channels=channels, **settings),
        results=figures,
        training=training_facts(network.state),
        provenance=_provenance(found.step, found.weights, hashes, found.extra),
        license=license,
        pipeline_tag=GENERATION,
        tags=("lightningdit", "class-conditional", "flow-matching", PAPER),
    )


def network_card(
    name: Path, source: Checkpoint | Path, results: Sequence[Path] = (), license: str | None = None
) -> Card:
    """The card of a LightningDiT in this project's layout, `<name>.safetensors`."""
    export = read_export(name)
    hashes = {"model": fingerprint(build_diffusion(export, select_ops("reference"), str(name)))}
    return Card(
        title=name.name,
        library="lightningdit",
        intro=_describe(export.config, export.weights),
        use=_OWN_USE.format(name=name.name, program="sample CONFIG ckpt_path="),
        results=figures_of(results, source, hashes),
        training=training_facts(source.state if isinstance(source, Checkpoint) else None),
        provenance=_provenance(export.step, export.weights, hashes, export.extra),
        license=license,
        pipeline_tag=GENERATION,
        tags=("lightningdit", "class-conditional", "flow-matching", PAPER),
    )


def tokenizer_card(
    name: Path, source: Checkpoint | Path, results: Sequence[Path] = (), license: str | None = None
) -> Card:
    """The card of a tokenizer: a folder of diffusers, or `<name>.safetensors` in this project's layout."""
    folder = name.is_dir()
    tokenizer = load_tokenizer(name if folder else export_paths(name)[0], select_ops("reference"))
    said = read_json(name / CONFIG_FILE)["_exported"] if folder else read_json(export_paths(name)[1])
    hashes, sizes = {"tokenizer": fingerprint(tokenizer)}, tokenizer.config
    use = _FOLDER_USE if folder else _OWN_USE
    ratio, channels = sizes.downsample_ratio, sizes.embed_dim
    return Card(
        title=name.name,
        library="diffusers" if folder else "lightningdit",
        intro=f"A tokenizer ({PAPER}) that makes latents of {channels} channels, {ratio} times smaller than an image.",
        use=use.format(name=name.name, program="extract CONFIG ckpt_path="),
        results=figures_of(results, source, hashes),
        training=training_facts(source.state if isinstance(source, Checkpoint) else None),
        provenance=_provenance(said["step"], said["weights"], hashes, said),
        license=license,
        tags=("vae", "tokenizer", PAPER),
    )


def _describe(config: ModelConfig, weights: str) -> str:
    size = config.input_size
    return (
        f"A LightningDiT ({PAPER}) of {config.depth} blocks, width {config.hidden_size} and patch {config.patch_size}, "
        f"for images of {config.num_classes:,} classes by latents of {config.in_channels} × {size} × {size}: the "
        f"{weights} weights, in float32."
    )


def _provenance(step: int | None, weights: str, hashes: Mapping[str, str], extra: Mapping[str, Any]) -> dict[str, Any]:
    versions = extra.get("versions")
    return {
        "step": "unknown" if step is None else f"{step:,}",
        "weights": weights,
        **{f"SHA-256 of the {what}'s tensors": value for what, value in hashes.items()},
        **{f"{what} in training": value for what, value in (versions if isinstance(versions, dict) else {}).items()},
    }
