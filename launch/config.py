"""Run files: one YAML file of sections and `key=value` overrides, loaded strictly, published files included.

    run = load("launch/configs/digits.yaml", ["train.max_steps=20"], kind="lightningdit")

Sections that a model understands are that model's (`lightningdit.config`, `vavae.config`); the ones here are about
running: steps, batches, precision, optimizer, DeepSpeed, kernels.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

import kernels
import lightningdit.config as dit
import vavae.config as vae
from common.sections import (
    Count,
    PathText,
    Positive,
    Probability,
    Recompute,
    Section,
    SmallCount,
    Text,
    describe,
    short,
)
from kernels.registry import check_names
from launch.config_files import ConfigError, merge, parse_value
from launch.evaluation.config import EvaluationConfig
from launch.extends import KEY, Layer, convert, explain, merged, read_layers, title, without_sizes
from launch.training.config import OptimizerConfig, TrainConfig
from launch.training.deepspeed_options import DeepSpeedConfig
from vavae.published import FOUNDATION_MODELS, from_published


class TokenizerSection(Section):
    """The `vae` section of a LightningDiT file: which tokenizer the latents are from, and where its weights are."""

    model_name: Text = "vavae_f16d32"
    downsample_ratio: SmallCount = 16
    ckpt_path: PathText | None = None


def _known_kernels(value: Any) -> Any:
    by_op = {"default": value} if isinstance(value, str) else value
    if not isinstance(by_op, dict) or not all(isinstance(item, str) for pair in by_op.items() for item in pair):
        raise ValueError(f"a backend's name, or names by op, is wanted (got {value!r})")
    check_names(kernels.OPS, by_op.get("default", "auto"), {op: b for op, b in by_op.items() if op != "default"})
    return value


Kernels = Annotated[str | dict[str, str], BeforeValidator(_known_kernels)]


def select_ops(choice: Kernels) -> kernels.Ops:
    """The ops of a `kernels` key: a backend's name, or names by op with `default` for the rest."""
    if isinstance(choice, str):
        return kernels.select(choice)
    named = dict(choice)
    return kernels.select(named.pop("default", "auto"), **named)


def _refuse_to_compile_gathering(train: TrainConfig, deepspeed: DeepSpeedConfig) -> None:
    if deepspeed.zero_stage == 3 and train.compile not in ("auto", "none"):
        raise ValueError(
            f"train.compile is {train.compile}, but deepspeed.zero_stage 3 gathers weights "
            "in the middle of the forward pass: use zero_stage 0, 1 or 2, or compile none"
        )


class DiffusionTrainConfig(TrainConfig):
    """The `train` section of a LightningDiT file.

    `previews` says how many samples by the moving average (without one: the weights) a picture shows in training, from
    the same noise and classes every time, decoded by the tokenizer of the `vae` section; null: 16 where that names one
    that is there, else none. `preview_every`: the steps between two (null: those between validations, else
    checkpoints; the last step always has one). `preview_steps`: points of the ODE solver, guided as `sample` says.
    """

    previews: Annotated[int, Field(ge=0, le=256)] | None = None
    preview_every: Count | None = None
    preview_steps: Annotated[int, Field(ge=2, le=1000)] = 25


class LightningDiTRun(Section):
    """A LightningDiT file. `ckpt_path` is what `sample` loads: a checkpoint, an export or a published .pt."""

    preset: Literal["paper", "default"] = "paper"
    ckpt_path: PathText | None = None
    data: dit.DataConfig
    vae: TokenizerSection = TokenizerSection()
    model: dit.ModelSection
    train: DiffusionTrainConfig = DiffusionTrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    transport: dit.TransportConfig = dit.TransportConfig()
    sample: dit.SampleConfig = dit.SampleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    kernels: Kernels = "auto"
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _check(self):
        ratio = self.vae.downsample_ratio
        if self.data.image_size % ratio:
            raise ValueError(f"data.image_size {self.data.image_size} is not a multiple of downsample_ratio {ratio}")
        self._check_latents(self.data.image_size // ratio)
        _refuse_to_compile_gathering(self.train, self.deepspeed)
        if self.train.compile == "regional" and self.network().use_checkpoint == "pointwise":
            raise ValueError(
                "train.compile is regional, but use_checkpoint pointwise looks into each block for what "
                "to keep: use use_checkpoint true or false, or compile inductor"
            )
        self._check_ops_in_graphs()
        self._check_previews()
        self._check_times()
        return self

    def _check_times(self) -> None:
        """Refuse average velocities of a network that is given one time."""
        dit.check_objective(self.transport, self.network())
        if self.sample.mode == "meanflow" and not self.model.time_pairs:
            raise ValueError("sample.mode meanflow needs model.time_pairs: true, and a network trained with them")

    def _check_previews(self) -> None:
        """Refuse to ask for previews and figures of samples that nothing could decode, and for times of no previews."""
        count, every = self.train.previews, self.train.preview_every
        if count and self.vae.ckpt_path is None:
            raise ValueError(f"train.previews is {count}, but vae.ckpt_path names no tokenizer to decode them")
        if every is not None and not self.num_previews():
            raise ValueError(f"train.preview_every is {every}, but {self._no_previews()}")
        figures = ", ".join(self.evaluation.figures)
        if figures and self.vae.ckpt_path is None:
            raise ValueError(f"evaluation.figures is {figures}, but vae.ckpt_path names no tokenizer to decode samples")

    def _no_previews(self) -> str:
        why = "train.previews is 0" if self.train.previews == 0 else "vae.ckpt_path names no tokenizer"
        return f"{why}: there are no previews"

    def num_previews(self) -> int:
        """Samples that a preview shows, if the tokenizer is there; 0 for no previews."""
        if self.train.previews is None:
            return 0 if self.vae.ckpt_path is None else 16
        return self.train.previews

    def without_effect(self) -> list[str]:
        """Notes on keys that a file sets and that change nothing."""
        found = self.train.without_effect(self.optimizer.ema_decay, self.data.valid_path)
        if "preview_steps" in self.train.model_fields_set and not self.num_previews():
            found.append(f"train.preview_steps is {self.train.preview_steps}, but {self._no_previews()}")
        return found + self.sample.without_effect() + self.evaluation.without_effect()

    def _check_latents(self, size: int) -> None:
        """Refuse latents of `size`² that the model's patches do not divide, and more guided channels than they have."""
        made = f"data.image_size {self.data.image_size} makes latents of {size} × {size}"
        ratio, patch = self.vae.downsample_ratio, self.model.patch
        if size % patch:
            raise ValueError(
                f"{made} (vae.downsample_ratio {ratio}), which patches of {patch} do not divide: use a "
                f"multiple of {ratio * patch}"
            )
        try:
            self.network()
        except ValidationError as e:
            raise ValueError(f"{made}: {describe(e)}") from None
        guided, channels = self.sample.cfg_channels, self.model.in_chans
        if guided is not None and guided > channels:
            raise ValueError(f"sample.cfg_channels is {guided}, but the latents have model.in_chans {channels}")

    def _check_ops_in_graphs(self) -> None:
        """Refuse to name an op that would take part in nothing."""
        named = {} if isinstance(self.kernels, str) else self.kernels
        compile, precision = self.train.compile, self.train.precision
        for name, backend in named.items():
            asked = name != "default" and kernels.OPS[name].graph_pass and backend not in ("auto", "reference")
            if asked and (compile in ("none", "aot_eager") or precision == "float32"):
                raise ValueError(
                    f"kernels.{name} is {backend}, but train.compile is {compile} and train.precision "
                    f"{precision}: it takes part in graphs that Inductor compiles, in bfloat16"
                )

    def network(self) -> dit.ModelConfig:
        """The network's shape for this run's latents and classes."""
        network = self.model.resolve(self.data.image_size // self.vae.downsample_ratio, self.data.num_classes)
        return network.model_copy(update={"use_checkpoint": network.use_checkpoint or self.train.use_checkpoint})

    def sampling(self, tuned: Mapping[str, Any] | None = None) -> dit.SampleConfig:
        """The `sample` section as the presets mean it.

        tuned: settings stored with the weights (`SampleConfig.tuned`), which `sample.preset: model` asks for; raises
        ConfigError where it does and there are none.
        """
        if self.sample.preset == "model":
            if tuned is None:
                raise ConfigError(
                    "sample.preset is model, but no settings are stored with weights here; use paper-64ep, paper-800ep "
                    "or default, or set the keys of sample themselves"
                )
            return self.sample.over(tuned)
        # A preset of the section says itself which channels are guided.
        as_published = self.preset == "paper" and self.sample.preset is None
        return dit.paper_sample(self.sample) if as_published else self.sample


class TokenizerTrainConfig(TrainConfig):
    """The `train` section of a tokenizer file; one setting holds for both networks, and for the frozen ones.

    Encoder, decoder, discriminator, foundation model and LPIPS are compiled each for itself. Activation checkpointing
    is by level of the encoder and the decoder. Validation takes long beside training: by default that of the average
    alone. `pictures` says of how many validation images a picture shows the
    reconstructions at every validation (0: no picture), `picture_similarities` whether another shows the similarities
    that the VF loss aligns.
    """

    global_batch_size: Count = 256
    compile: Literal["auto", "none", "inductor", "cudagraphs", "aot_eager"] = "auto"
    use_checkpoint: Recompute = False
    valid_weights: Literal["both", "ema", "model"] = "ema"
    pictures: Annotated[int, Field(ge=0, le=256)] = 16
    picture_similarities: bool = False


class TokenizerOptimizerConfig(OptimizerConfig):
    """Adam(0.5, 0.9) at 1e-4 for both networks, not scaled by the batch; no moving average unless asked for."""

    lr: Positive = 1e-4
    beta1: Probability = 0.5
    beta2: Probability = 0.9
    ema_decay: Probability = 0.0


class VavaeRun(Section):
    """A tokenizer file of ours; a published LDM-style one is translated into it (`vavae.published`)."""

    preset: Literal["paper", "default"]
    ckpt_path: PathText | None = None
    model: vae.AutoencoderConfig
    foundation: vae.FoundationConfig | None = None
    loss: vae.LossConfig = vae.LossConfig()
    data: vae.DataConfig = vae.DataConfig()
    train: TokenizerTrainConfig = TokenizerTrainConfig()
    optimizer: TokenizerOptimizerConfig = TokenizerOptimizerConfig()
    stages: tuple[vae.StageConfig, ...] = Field((), strict=False)  # none: one loss for the whole run
    kernels: Kernels = "auto"
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _check(self):
        balanced = self.loss.use_gan or (self.loss.use_vf and self.loss.adaptive_vf)
        if self.deepspeed.zero_stage == 3 and balanced:
            raise ValueError(
                "deepspeed.zero_stage 3 gathers weights for one backward pass, but balancing the VF and "
                "GAN terms takes several: use 0, 1 or 2, or loss.adaptive_vf false and loss.disc_weight 0"
            )
        _refuse_to_compile_gathering(self.train, self.deepspeed)
        if (
            self.train.use_checkpoint == "pointwise"
            and self.train.compile == "none"
            and vae.balances_both(self.loss, self.stages)
        ):
            raise ValueError(
                "train.use_checkpoint is pointwise and train.compile none, but balancing both the VF and the GAN term "
                "takes two backward passes through the decoder: use use_checkpoint true, or compile inductor"
            )
        if self.train.residual_dtype != "float32":
            raise ValueError("train.residual_dtype is for LightningDiT; a tokenizer allows only float32")
        self._check_pictures()
        return self

    def _check_pictures(self) -> None:
        """Refuse to ask for pictures that nothing would make."""
        lacking = {
            "loss.use_vf is false": not self.loss.use_vf,
            "train.pictures is 0": self.train.pictures == 0,
            "data.valid_path names no images": self.data.valid_path is None,
        }
        if self.train.picture_similarities and (why := [reason for reason, lacks in lacking.items() if lacks]):
            raise ValueError(f"train.picture_similarities is true, but {' and '.join(why)}")

    def without_effect(self) -> list[str]:
        """Notes on keys that a file sets and that change nothing."""
        found = self.train.without_effect(self.optimizer.ema_decay, self.data.valid_path)
        if "pictures" in self.train.model_fields_set and self.train.pictures and self.data.valid_path is None:
            found.append(f"train.pictures is {self.train.pictures}, but data.valid_path names no images to show")
        return found

    def images(self) -> vae.DataConfig:
        """The `data` section as the preset means it."""
        return self.data.as_published() if self.preset == "paper" else self.data

    def features(self) -> vae.FoundationConfig | None:
        """The `foundation` section as the preset means it: the paper feeds its own two models [−1, 1] unless the file
        says otherwise."""
        found = self.foundation
        if found is None or self.preset != "paper" or "normalization" in found.model_fields_set:
            return found
        papers = found.model_name in FOUNDATION_MODELS.values()
        return found.model_copy(update={"normalization": "published"}) if papers else found


Run = LightningDiTRun | VavaeRun
KINDS = {"lightningdit": LightningDiTRun, "vavae": VavaeRun}
NAMES = {"lightningdit": "LightningDiT", "vavae": "tokenizer"}


def load(path: str | Path, overrides: Iterable[str] = (), *, kind: str) -> tuple[Section, list[str]]:
    """Read a run file of `kind` ("lightningdit" or "vavae") and what it extends, apply overrides, check all of it.

    A file with the key `extends: base.yaml` says what differs from that file (`launch.extends`). Values of overrides,
    `key=value`, are YAML; keys are dotted (`train.max_steps=20`); a mapping is merged into the section that is there,
    and anything else, `{}` too, takes the place of what is. A published LDM-style tokenizer file is translated first,
    so overrides and files that extend it use our keys, and may give what it leaves open. What only training needs may
    be missing: `launch.training.checks.check_run` asks for it. A file of `launch/configs/` may be given by its name
    alone.

    Returns:
        The run, and notes: which file was taken where a shipped one has its name, which ones it extends, what of a
        published one was converted or ignored.

    Raises:
        ConfigError: a file is absent, no YAML mapping, or the other model's; a key is unknown (the nearest is named) or
            stands twice; a value has the wrong type or is not allowed, or values contradict each other. Where several
            files were read, the one that a value is from is named.
    """
    layers, notes = read_layers(path)
    named = title(layers)
    said: dict = {}
    try:
        layers, converted = convert(layers, partial(_in_our_keys, kind=kind))
        document = merged(layers)
        for override in overrides:
            document = _overridden(without_sizes(document, _overridden({}, override)), override)
            said = _overridden(said, override)
        run = KINDS[kind].model_validate(document)
        return run, notes + converted + run.deepspeed.notes() + run.without_effect()
    except ValidationError as e:
        raise ConfigError(f"{named}: {explain(e, [*layers, Layer('', said)])}") from None
    except ValueError as e:
        raise ConfigError(f"{named}: {e}") from None


def stored_run(content: dict, source: str | Path, overrides: Iterable[str] = (), *, kind: str) -> Section:
    """The run file stored in a checkpoint; raises ConfigError, naming `source`, where it is not valid for `kind`."""
    try:
        for override in overrides:
            content = _overridden(content, override)
        return KINDS[kind].model_validate(content)
    except ValidationError as e:
        raise ConfigError(f"{source}: {describe(e)}") from None


def _in_our_keys(document: dict, kind: str, extends: bool) -> tuple[dict, list[str]]:
    """A document of `kind`, a published tokenizer's translated, and notes on that. `extends`: it names a base."""
    _refuse_other_kind(document, kind)
    model = document.get("model")
    if kind != "vavae" or not ("lightning" in document or (isinstance(model, Mapping) and "params" in model)):
        return document, []
    if extends:
        raise ConfigError(
            "a file with the keys of a published tokenizer (model.params, lightning) can be extended, but extends "
            "none: write what differs in the keys of our run files (model, loss, data, train …)"
        )
    return from_published(document)


def _refuse_other_kind(document: Mapping, kind: str) -> None:
    """Raise ConfigError where a document has keys that only the other model's run files have, and none of its own."""
    other = next(name for name in KINDS if name != kind)
    theirs, ours = _keys_of(document, other), _keys_of(document, kind)
    if theirs and not ours:
        raise ConfigError(
            f"this is a {NAMES[other]} run file (it has {', '.join(theirs)}); one of a {NAMES[kind]} is "
            f"wanted, with keys such as {', '.join(_OWN_KEYS[kind][:3])}"
        )


# Keys that only one of the models has; of LDM-style files those that ours do not have.
_OWN_KEYS = {
    "lightningdit": (
        "transport",
        "sample",
        "vae",
        *(f"model.{key}" for key in dit.ModelSection.model_fields if key not in vae.AutoencoderConfig.model_fields),
    ),
    "vavae": (
        "loss",
        "foundation",
        "stages",
        "lightning",
        "model.params",
        "model.size",
        *(f"model.{key}" for key in vae.AutoencoderConfig.model_fields if key not in dit.ModelSection.model_fields),
    ),
}


def _keys_of(document: Mapping, kind: str) -> list[str]:
    model = document.get("model")
    inner = model if isinstance(model, Mapping) else {}
    return [key for key in _OWN_KEYS[kind] if key in document or (key.removeprefix("model.") in inner and "." in key)]


def overridden_keys(overrides: Iterable[str], section: str) -> set[str]:
    """The keys of a section that overrides set, `section.key=value` and `section={key: value}` alike."""
    said: dict = {}
    for override in overrides:
        said = _overridden(said, override)
    found = said.get(section)
    return set(found) if isinstance(found, Mapping) else set()


def _overridden(document: dict, override: str) -> dict:
    """The document with an override in it; it is not changed itself, whose anchors may stand in several places."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {short(override)} is not of the form key=value, such as train.max_steps=20")
    *sections, last = key.split(".")
    if key.split(".")[0] == KEY:
        raise ConfigError(f"override {short(override)}: {KEY} stands in a file, which is read before overrides")
    inner = document
    for section in sections:
        inner = {} if inner.get(section) is None else inner[section]
        if not isinstance(inner, dict):
            raise ConfigError(f"override {short(override)}: {section} holds {short(inner)}, not a section")
    value = parse_value(text, f"override {short(override)}")
    if value and isinstance(value, dict) and isinstance(inner.get(last), dict):
        value = merge(inner[last], value)
    return _replaced(document, [*sections, last], value)


def _replaced(document: dict, names: list[str], value: Any) -> dict:
    name, *rest = names
    return {**document, name: _replaced(document.get(name) or {}, rest, value) if rest else value}
