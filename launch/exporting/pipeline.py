"""LightningDiTs as pipelines of diffusers, which `DiffusionPipeline.from_pretrained` loads; see `launch.pipelines`.

diffusers itself is not needed to write one. Where it looks for code follows from its
pipelines/pipeline_loading_utils.py (version: `vavae.diffusers_layout.VERSION`): the file of a part's class is
`<part>/<library>.py`, that of the pipeline's `<_class_name[0]>.py`, so one file serves both. Lists in model_index.json
are parts: settings are none.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import make_directory, sha256, write_json, write_text
from common.tensors import FOLDER_WEIGHTS, as_float32, write_tensors
from launch.config import ConfigError, select_ops
from launch.exporting.card import CARD, figures_of
from launch.exporting.cards import pipeline_card
from launch.exporting.networks import Network
from launch.exporting.places import new_folder
from launch.exporting.tokenizer import write_tokenizer
from launch.pipelines import (
    INDEX,
    NETWORK,
    NETWORK_CLASS,
    PUBLIC,
    SCHEDULER,
    SCHEDULER_CLASS,
    SCHEDULER_FILE,
    TOKENIZER,
    scheduler_shift,
    tables,
)
from launch.trained import build_diffusion
from launch.training.checkpoint import Checkpoint
from lightningdit.config import ModelConfig, SampleConfig, TransportConfig
from lightningdit.weights import Export
from vavae.diffusers_layout import CLASS, CONFIG_FILE, VERSION
from vavae.model import AutoencoderKL
from vavae.weights import fingerprint

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("lightningdit_pipeline.py")
TRAIN_TIMESTEPS = 1000  # the scheduler's unit of time
_TOLERANCE = 1e-5  # of tables of positions, which others computed in other orders


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline folder is made of.

    network: with its latents' statistics. source: of messages, where the network is from. facts: such as step and
    weights; they go into transformer/config.json as `_exported`, which diffusers leaves alone.
    """

    network: Export
    tokenizer: AutoencoderKL
    settings: SampleConfig
    transport: TransportConfig
    source: str
    facts: Mapping[str, Any]

    def check(self) -> dict[str, str]:
        """Hashes of both networks; raises ConfigError where the pipeline would sample another model than this."""
        have, want = self.tokenizer.config.embed_dim, self.network.config.in_channels
        if have != want:
            raise ConfigError(f"the tokenizer decodes latents of {have} channels, {self.source} makes {want}")
        if reasons := self.inexpressible():
            raise ConfigError(f"{self.source} is no pipeline of diffusers: {'; '.join(reasons)}")
        model = build_diffusion(self.network, select_ops("reference"), self.source)
        return {"model": fingerprint(model), "tokenizer": fingerprint(self.tokenizer)}

    def inexpressible(self) -> list[str]:
        """Why diffusers' schedulers would not solve this model's equation; empty where they do."""
        transport = self.transport
        reasons = {
            f"transport.path_type is {transport.path_type}, not Linear, as its flow matching is": (
                transport.path_type != "Linear"
            ),
            f"transport.prediction is {transport.prediction}, not velocity": transport.prediction != "velocity",
            "model.time_pairs is true, and the pipeline's network takes one time": self.network.config.time_pairs,
            f"sample.cfg_scale is {self.settings.cfg_scale:g}, and a network without a null label (class_dropout_prob "
            "0) allows 1": self.settings.cfg_scale != 1 and self.network.config.null_label is None,
        }
        if different := different_tables(self.network):
            reasons[f"{', '.join(different)} are not the tables that the sizes give, which are made anew there"] = True
        return [reason for reason, holds in reasons.items() if holds]

    def remarks(self) -> list[str]:
        """What of the `sample` section its stock scheduler and guidance do otherwise."""
        settings, said = self.settings, []
        if (settings.mode, settings.sampling_method.lower()) != ("ODE", "euler"):
            said.append(
                f"sample.mode {settings.mode} and sampling_method {settings.sampling_method}: the pipeline's scheduler "
                "is Euler's, on the same grid of times"
            )
        if settings.guided_by_network:
            key = "guide_step" if settings.guide_ckpt_path is None else "guide_ckpt_path"
            said.append(f"sample.{key}: the pipeline guides by the null label, not by a second network")
        return said


def different_tables(network: Export) -> list[str]:
    """Names of fixed tables of positions in a network's weights that are not those of its sizes."""
    own, state = tables(network.config), network.state
    stored = [name for name in own if name in state and state[name].shape == own[name].shape]
    return [name for name in stored if not torch.allclose(state[name].float(), own[name], rtol=0, atol=_TOLERANCE)]


def export_pipeline(
    network: Network,
    folder: Path,
    tokenizer: Path | None = None,
    *,
    results: Sequence[Path] = (),
    beside: Checkpoint | Path | None = None,
    license: str | None = None,
) -> list[Path]:
    """Write a LightningDiT as a pipeline folder → its files.

    tokenizer: in place of the run's. results: what `evaluate` wrote of these weights; without them those are taken that
    lie beside a checkpoint's run or a file. Raises ValueError where the folder is already there, diffusers has no such
    pipeline, or results are of other weights or were decoded by another tokenizer.
    """
    with new_folder(folder) as made:
        found = network.found
        facts = {"step": found.step, "weights": found.weights, "source": network.name}
        parts = (network.settings(), network.transport(), network.source, facts)
        pipeline = Pipeline(found, network.tokenizer(tokenizer), *parts)
        hashes = pipeline.check()
        figures = figures_of(results, beside, hashes)
        remarks = [*network.remarks(), *pipeline.remarks()]
        for remark in remarks:
            log.warning("%s", remark)
        written = write_pipeline(made, pipeline, hashes)
        code, said = f"{NETWORK}/{SOURCE.name}", _settings(pipeline.settings)
        card = pipeline_card(folder.name, network, hashes, figures, remarks, license, code=code, settings=said)
        write_text(made / CARD, str(card))
    return [folder / path.relative_to(made) for path in (*written, made / CARD)]


def write_pipeline(folder: Path, pipeline: Pipeline, hashes: Mapping[str, str]) -> list[Path]:
    """Write a pipeline that `Pipeline.check` has found fit into an empty folder → its files."""
    network = pipeline.network
    transformer, vae, scheduler = (make_directory(folder / part) for part in (NETWORK, TOKENIZER, SCHEDULER))
    weights = transformer / FOLDER_WEIGHTS[0]
    made_anew = tables(network.config)
    write_tensors(weights, as_float32({k: v for k, v in network.state.items() if k not in made_anew}))
    said = {
        **pipeline.facts,
        "hashes": dict(hashes),
        "sha256": sha256(weights),
        "transport": pipeline.transport.model_dump(),
        "sample": {key: value for key, value in pipeline.settings.tuned().items() if not key.startswith("guide_")},
    }
    if "classes" in network.extra:
        said["classes"] = network.extra["classes"]
    write_json(transformer / CONFIG_FILE, _network_config(network.config) | {"_exported": said})
    write_text(transformer / SOURCE.name, SOURCE.read_text(encoding="utf-8"))
    written = write_tokenizer(vae, pipeline.tokenizer, network.latents, sha256=hashes["tokenizer"])
    write_json(scheduler / SCHEDULER_FILE, _scheduler_config(pipeline.settings))
    write_json(folder / INDEX, _index(pipeline))
    own = [transformer / CONFIG_FILE, weights, transformer / SOURCE.name]
    return [folder / INDEX, *own, *written, scheduler / SCHEDULER_FILE]


def _network_config(config: ModelConfig) -> dict:
    named = {"_class_name": NETWORK_CLASS, "_diffusers_version": VERSION}
    return named | config.model_dump(exclude={"use_checkpoint", "time_pairs"})


def _scheduler_config(settings: SampleConfig) -> dict:
    return {
        "_class_name": SCHEDULER_CLASS,
        "_diffusers_version": VERSION,
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "shift": scheduler_shift(settings.timestep_shift),
        "use_dynamic_shifting": False,
    }


def _index(pipeline: Pipeline) -> dict:
    names = pipeline.network.extra.get("classes")
    return {
        "_class_name": [f"{NETWORK}/{SOURCE.stem}", "LightningDiTPipeline"],
        "_diffusers_version": VERSION,
        NETWORK: [SOURCE.stem, NETWORK_CLASS],
        TOKENIZER: ["diffusers", CLASS],
        SCHEDULER: ["diffusers", SCHEDULER_CLASS],
        **_settings(pipeline.settings),
        "id2label": None if names is None else {str(label): name for label, name in enumerate(names)},
    }


def _settings(settings: SampleConfig) -> dict:
    """What the pipeline does without being told."""
    return {
        "num_inference_steps": settings.num_sampling_steps - 1,  # grid points there, steps between them here
        **{name: getattr(settings, own) for name, own in PUBLIC.items()},
    }
