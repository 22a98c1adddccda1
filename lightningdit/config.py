"""Config sections of a LightningDiT run: frozen, strictly typed, checked on construction.

`ModelConfig` describes the network alone. The other sections are those of the published YAML files (`model`,
`transport`, `sample`, `data`), under the published key names, with keys of this project beside them, marked "Ours". A
wrong value raises pydantic's `ValidationError`, a ValueError that names the key, the value got and what is allowed.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.sections import (
    Classes,
    Count,
    CountFrom0,
    Float,
    NonNegative,
    PathText,
    Positive,
    Probability,
    RecomputeBlocks,
    Section,
    Size,
    SmallCount,
    SmallCountFrom0,
    Text,
)
from common.text import nearest

MAX_POSITIONS = 2**27  # elements of `pos_embed`: enough for 65,536 tokens of the widest named model
MlpRatio = Annotated[Float, Field(gt=0, le=256)]


class ModelConfig(Section):
    """The network's shape, under the names and with the defaults of the published constructor (arXiv 2501.01423).

    `input_size` is the latent's height and width. The null label is `num_classes`; with a `class_dropout_prob` of 0
    there is none, nor its row in the label table.

    Ours: `time_pairs`, whether the network is also given a second time, the other end of an interval over which it
    predicts the average velocity (arXiv 2505.13447); its weights are then the published ones and `r_embedder.*`.
    """

    input_size: Size = 32
    patch_size: SmallCount = 2
    in_channels: Size = 4
    hidden_size: Size = 1152
    depth: SmallCount = 28
    num_heads: SmallCount = 16
    mlp_ratio: MlpRatio = 4.0
    class_dropout_prob: Probability = 0.1
    num_classes: Classes = 1000
    learn_sigma: bool = False
    use_qknorm: bool = False
    use_swiglu: bool = False
    use_rope: bool = False
    use_rmsnorm: bool = False
    wo_shift: bool = False
    use_checkpoint: RecomputeBlocks = False
    time_pairs: bool = False

    @model_validator(mode="after")
    def _check(self):
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.num_tokens * self.hidden_size > MAX_POSITIONS:
            raise ValueError(
                f"{self.num_tokens:,} tokens of hidden_size {self.hidden_size} make a table of positions "
                f"of more than {MAX_POSITIONS:,} numbers"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4, as the 2-D sin-cos table needs")
        if self.use_rope and self.head_dim % 4:
            raise ValueError(f"hidden_size / num_heads = {self.head_dim} is not a multiple of 4, as 2-D RoPE needs")
        if self.mlp_hidden < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves no hidden units at hidden_size {self.hidden_size}")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of the latent."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid_size**2

    @property
    def out_channels(self) -> int:
        """Channels of the last layer's output; with learn_sigma the second half of them is dropped."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the feed-forward layer; SwiGLU's is two thirds, rounded down (2730 for L, 4778 for 1p6B)."""
        hidden = int(self.hidden_size * self.mlp_ratio)
        return int(2 / 3 * hidden) if self.use_swiglu else hidden

    @property
    def modulation_parts(self) -> int:
        """adaLN vectors of hidden_size per block: shift (unless wo_shift), scale and gate for both branches."""
        return 4 if self.wo_shift else 6

    @property
    def null_label(self) -> int | None:
        """The label of the unconditional model; None for a model without one."""
        return self.num_classes if self.class_dropout_prob > 0 else None


# depth, hidden_size, num_heads (arXiv 2501.01423; S is not in it and has the ratios of DiT-S)
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}
PATCHES = (1, 2)
MODEL_NAMES = tuple(f"LightningDiT-{size}/{patch}" for size in SIZES for patch in PATCHES)


def named_config(name: str, **fields) -> ModelConfig:
    """The config of a registered model such as 'LightningDiT-XL/1'; `fields` are the other fields of `ModelConfig`.

    Raises ValueError on an unknown name (the nearest one is suggested) and on a field that the name already fixes.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"unknown model {name!r}{nearest(name, MODEL_NAMES)}; known: {', '.join(MODEL_NAMES)}")
    size, patch = name.removeprefix("LightningDiT-").split("/")
    depth, hidden_size, num_heads = SIZES[size]
    fixed: dict[str, Any] = dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=int(patch))
    duplicates = sorted(fixed.keys() & fields.keys())
    if duplicates:
        raise ValueError(
            f"{', '.join(duplicates)}: already fixed by the name {name}; leave the name out for a custom model"
        )
    return ModelConfig(**fixed, **fields)


class ModelSection(Section):
    """The `model` section: a registered `model_type`, or the four sizes of a custom model."""

    model_type: Text | None = None
    hidden_size: Size | None = None
    depth: SmallCount | None = None
    num_heads: SmallCount | None = None
    patch_size: SmallCount | None = None
    in_chans: Size = 4
    mlp_ratio: MlpRatio = 4.0
    class_dropout_prob: Probability = 0.1
    use_qknorm: bool = False
    use_swiglu: bool = False
    use_rope: bool = False
    use_rmsnorm: bool = False
    wo_shift: bool = False
    learn_sigma: bool = False
    use_checkpoint: RecomputeBlocks = False
    time_pairs: bool = False

    @model_validator(mode="after")
    def _check(self):
        missing = [key for key in ("hidden_size", "depth", "num_heads", "patch_size") if getattr(self, key) is None]
        if self.model_type is None and missing:
            raise ValueError(f"give model_type (one of {', '.join(MODEL_NAMES)}) or also {', '.join(missing)}")
        # Raises on impossible sizes, before a model is built.
        self.resolve(input_size=16 * (self.patch_size or 1), num_classes=1)
        return self

    @property
    def patch(self) -> int:
        """Side of a patch, in latent positions."""
        if self.model_type is not None:
            return int(self.model_type.partition("/")[2])
        assert self.patch_size is not None
        return self.patch_size

    def resolve(self, input_size: int, num_classes: int) -> ModelConfig:
        """The `ModelConfig` of this section for latents of `input_size`² and `num_classes` labels.

        Raises ValueError where the sizes do not fit together.
        """
        given = self.model_dump(exclude={"model_type", "in_chans"}, exclude_none=True)
        given |= dict(input_size=input_size, num_classes=num_classes, in_channels=self.in_chans)
        return ModelConfig(**given) if self.model_type is None else named_config(self.model_type, **given)


PathType = Literal["Linear", "GVP", "VP"]
Prediction = Literal["velocity", "noise", "score"]
LossWeight = Literal["velocity", "likelihood"]


Objective = Literal["flow", "meanflow", "improved_meanflow"]


class TransportConfig(Section):
    """The `transport` section: path, prediction and loss of flow matching (see `lightningdit.flow`).

    Ours: `lognorm_until_step`, the last optimizer step with logit-normal timesteps (the published 800-epoch run
    switches to uniform ones at 600,000); None keeps `use_lognorm` for the whole run. `lognorm_mean` and `lognorm_std`
    are those of the normal numbers whose sigmoids they are.

    `objective`: "flow", or one of average velocities (see `lightningdit.meanflow`), for which `model.time_pairs` is
    needed and the rest is meant: `equal_times`, the share of samples whose two times are one, which train the velocity
    itself; `adaptive_power` and `adaptive_floor`, p and c of the weight (‖Δ‖² + c)^-p of a sample (p = 0: none);
    `guidance_scale`, the scale of classifier-free guidance that is learned into the one evaluation (1: none), at times
    from `guidance_start` to `guidance_end`; `guidance_mix`, the share κ of it that is the network's own prediction.
    """

    path_type: PathType = "Linear"
    prediction: Prediction = "velocity"
    loss_weight: LossWeight | None = None
    sample_eps: Annotated[Float, Field(ge=0, lt=0.5)] | None = None
    train_eps: Annotated[Float, Field(ge=0, lt=0.5)] | None = None
    use_cosine_loss: bool = False
    use_lognorm: bool = False
    lognorm_until_step: Count | None = None
    lognorm_mean: Float = 0.0
    lognorm_std: Positive = 1.0
    objective: Objective = "flow"
    equal_times: Annotated[Float, Field(ge=0, le=1)] = 0.75
    adaptive_power: NonNegative = 1.0
    adaptive_floor: Positive = 1e-3
    guidance_scale: Annotated[Float, Field(ge=1)] = 1.0
    guidance_mix: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    guidance_start: Annotated[Float, Field(ge=0, le=1)] = 0.0
    guidance_end: Annotated[Float, Field(ge=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check(self):
        if self.prediction == "velocity" and self.loss_weight is not None:
            raise ValueError(f"loss_weight {self.loss_weight!r} applies to noise and score; velocity allows only null")
        if self.prediction != "velocity" and self.use_cosine_loss:
            raise ValueError(f"use_cosine_loss needs prediction velocity, not {self.prediction!r}")
        if self.lognorm_until_step is not None and not self.use_lognorm:
            raise ValueError("lognorm_until_step needs use_lognorm: true")
        if not self.use_lognorm and (self.lognorm_mean, self.lognorm_std) != (0, 1):
            raise ValueError("lognorm_mean and lognorm_std need use_lognorm: true")
        self._check_objective()
        return self

    def _check_objective(self) -> None:
        if self.objective == "flow":
            others = [key for key in MEANFLOW_KEYS if getattr(self, key) != type(self).model_fields[key].default]
            if others:
                named = ", ".join(f"{key} {getattr(self, key)}" for key in others)
                raise ValueError(f"{named}: of average velocities, but objective is flow; allowed: {MEANFLOWS}")
            return
        if self.prediction != "velocity":
            raise ValueError(f"objective {self.objective} needs prediction velocity, not {self.prediction!r}")
        if self.use_cosine_loss:
            raise ValueError(f"use_cosine_loss true is of objective flow; {self.objective} allows only false")
        if self.path_type == "VP":
            raise ValueError(f"objective {self.objective} needs path_type Linear or GVP: the velocity of VP has no end")
        if self.guidance_end < self.guidance_start:
            raise ValueError(
                f"guidance_end {self.guidance_end:g} lies below guidance_start {self.guidance_start:g}; "
                "guidance_scale 1 guides nowhere"
            )
        of_guidance = ("guidance_mix", "guidance_start", "guidance_end")
        idle = [key for key in of_guidance if getattr(self, key) != type(self).model_fields[key].default]
        if self.guidance_scale == 1 and idle:
            raise ValueError(f"{idle[0]} {getattr(self, idle[0]):g} is of guidance, but guidance_scale is 1")
        if self.objective == "improved_meanflow" and self.guidance_mix:
            raise ValueError("guidance_mix is of objective meanflow; improved_meanflow guides by predictions alone")

    @property
    def time_pairs(self) -> bool:
        """Whether the network that is trained needs `model.time_pairs`."""
        return self.objective != "flow"


#: Keys of `TransportConfig` that objective flow leaves alone, and the objectives that they are of.
MEANFLOW_KEYS = (
    *("equal_times", "adaptive_power", "adaptive_floor"),
    *("guidance_scale", "guidance_mix", "guidance_start", "guidance_end"),
)
MEANFLOWS = "meanflow, improved_meanflow"


def check_objective(transport: TransportConfig, model: ModelConfig) -> None:
    """Raise ValueError where the network lacks what the objective asks of it."""
    if transport.time_pairs and not model.time_pairs:
        raise ValueError(f"transport.objective {transport.objective} needs model.time_pairs: true")
    if transport.guidance_scale != 1 and model.null_label is None:
        raise ValueError(
            f"transport.guidance_scale {transport.guidance_scale:g} needs a null label; set model.class_dropout_prob"
        )


ODE_METHODS = ("euler", "midpoint", "heun", "heun3", "rk4", "dopri5")
SDE_METHODS = ("euler", "heun")
Schedule = Literal["constant", "linear", "cosine"]
DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("Mean", "Tweedie", "Euler")
LabelProtocol = Literal["index", "balanced", "shuffled", "random"]
SampleFormat = Literal["npz", "png", "webp", "latents"]


_EULER = {"mode": "ODE", "sampling_method": "euler", "num_sampling_steps": 250, "timestep_shift": 0.3}
_CONSTANT = {"cfg_interval_end": 1.0, "cfg_schedule": "constant"}
#: Values of `sample.preset`: those of the published runs of 64 and 800 epochs (arXiv 2501.01423), and ours.
SAMPLE_PRESETS: dict[str, dict[str, Any]] = {
    "paper-64ep": _EULER | _CONSTANT | {"cfg_scale": 10.0, "cfg_interval_start": 0.10, "cfg_channels": 3},
    "paper-800ep": _EULER | _CONSTANT | {"cfg_scale": 6.7, "cfg_interval_start": 0.125, "cfg_channels": 3},
    "default": _EULER | _CONSTANT | {"cfg_scale": 4.0, "cfg_interval_start": 0.11, "cfg_channels": None},
}


class SampleConfig(Section):
    """The `sample` section. `num_sampling_steps` counts grid points: 250 are 249 Euler updates, as published.

    Ours: `cfg_channels` (the number of leading channels that are guided, None for all; the published code guides 3),
    `seed`, `precision` of the network, and the options of the SDE. Guidance is off at `cfg_scale` 1 and at times
    outside `cfg_interval_start` to `cfg_interval_end`, both compared after the shift; by `cfg_schedule` its scale grows
    with time (`lightningdit.guidance`). `likelihood`: also compute the log-likelihood of each sample, which takes a
    second, longer solve and is defined for the unguided ODE.

    A weaker network guides in the place of the null label (autoguidance) where `guide_ckpt_path` names a checkpoint, an
    export or a published .pt, of any size, or `guide_step` an earlier checkpoint of the run that is sampled;
    `guide_weights` says which of its weights.

    `mode` "meanflow" takes `mean_steps` steps of equal length by average velocities, each one evaluation, with a
    network that was trained for them (`transport.objective`). Guidance is in the network then: `cfg_scale` is 1 where
    it is not set, and may be nothing else.

    `preset` gives values to keys that are not set themselves: those of `SAMPLE_PRESETS`, or with "model" those that are
    stored with the weights (see `tuned`). `compile`: "auto" compiles the network and captures steps as CUDA graphs on a
    CUDA device, and compiles nothing on a CPU; see `lightningdit.sampler.BatchSampler`.

    `per_proc_batch_size` is the number of samples that a process makes at once (null: by memory; the
    published files say 4). `labels` says which class sample i is of: "index" (i modulo the classes), "balanced" (every
    run of as many samples as there are classes has each class once, in an order of its own from the seed), "shuffled"
    (those of "index" in one order from the seed), "random" (uniform, from the seed and i: the published protocol).
    `format` is what is written: an ADM "npz", a folder of "png" or lossless "webp", or "latents".
    """

    mode: Literal["ODE", "SDE", "meanflow"] = "ODE"
    mean_steps: Annotated[int, Field(ge=1, le=1000)] = 1
    sampling_method: Text = "euler"
    atol: Positive = 1e-6
    rtol: Positive = 1e-3
    reverse: Literal[False] = False
    likelihood: bool = False
    num_sampling_steps: Annotated[int, Field(ge=2, le=100_000)] = 250
    cfg_scale: Annotated[Float, Field(ge=1)] = 4.0
    cfg_interval_start: Annotated[Float, Field(ge=0, le=1)] = 0.11
    timestep_shift: NonNegative = 0.3
    per_proc_batch_size: Size | None = None
    fid_num: Annotated[int, Field(ge=1, le=10**8)] = 50_000
    cfg_channels: Size | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    diffusion_form: Text = "sigma"
    diffusion_norm: Positive = 1.0
    last_step: Literal["Mean", "Tweedie", "Euler"] | None = "Mean"
    last_step_size: Annotated[Float, Field(gt=0, lt=1)] = 0.04
    cfg_interval_end: Annotated[Float, Field(ge=0, le=1)] = 1.0
    cfg_schedule: Schedule = "constant"
    guide_ckpt_path: PathText | None = None
    guide_step: CountFrom0 | None = None
    guide_weights: Literal["ema", "model"] = "ema"
    preset: Literal["paper-64ep", "paper-800ep", "default", "model"] | None = None
    compile: Literal["auto", "none", "inductor", "cudagraphs"] = "auto"
    labels: LabelProtocol = "index"
    format: SampleFormat = "npz"

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Values of the preset under those that are set; what is read again later holds them all."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        if isinstance(preset, str) and preset in SAMPLE_PRESETS:
            values = SAMPLE_PRESETS[preset] | values
        return {"cfg_scale": 1.0} | values if values.get("mode") == "meanflow" else values

    @model_validator(mode="after")
    def _check(self):
        if self.mode == "meanflow" and self.cfg_scale != 1:
            raise ValueError(
                f"cfg_scale is {self.cfg_scale:g}, but mode meanflow has its guidance from training; allowed: 1"
            )
        methods = SDE_METHODS if self.mode == "SDE" else ODE_METHODS
        if self.mode != "meanflow" and self.sampling_method.lower() not in methods:
            hint = nearest(self.sampling_method.lower(), methods)
            raise ValueError(f"sampling_method {self.sampling_method!r}{hint}; {self.mode} has {', '.join(methods)}")
        if self.diffusion_form not in DIFFUSION_FORMS:
            hint = nearest(self.diffusion_form, DIFFUSION_FORMS)
            raise ValueError(f"diffusion_form {self.diffusion_form!r}{hint}; known: {', '.join(DIFFUSION_FORMS)}")
        if self.likelihood and (self.mode, self.cfg_scale) != ("ODE", 1):
            raise ValueError(f"likelihood needs mode ODE and cfg_scale 1, not {self.mode} and {self.cfg_scale:g}")
        self._check_guidance()
        return self

    def _check_guidance(self) -> None:
        if self.cfg_interval_end < self.cfg_interval_start:
            raise ValueError(
                f"cfg_interval_end {self.cfg_interval_end:g} lies below cfg_interval_start "
                f"{self.cfg_interval_start:g}; cfg_scale 1 guides nowhere"
            )
        if self.guide_ckpt_path is not None and self.guide_step is not None:
            raise ValueError(
                f"guide_ckpt_path {self.guide_ckpt_path} and guide_step {self.guide_step} name two networks that "
                "guide; give one of them"
            )
        if self.compile == "cudagraphs" and self.mode == "ODE" and self.sampling_method.lower() == "dopri5":
            raise ValueError("compile is cudagraphs, but dopri5 chooses its steps as it goes; allowed: none, inductor")

    @property
    def guided_by_network(self) -> bool:
        """Whether another network guides."""
        return self.cfg_scale != 1 and (self.guide_ckpt_path is not None or self.guide_step is not None)

    def without_effect(self) -> list[str]:
        """Notes on keys that are set and change nothing, and on values of the preset that others take the place of."""
        return [*self._of_preset(), *self._of_mode(), *self._of_guidance()]

    def _of_mode(self) -> list[str]:
        if self.mode == "meanflow" or not self._differs("mean_steps"):
            return []
        return [f"sample.mean_steps is {self.mean_steps}, but sample.mode is {self.mode}, not meanflow"]

    def _of_preset(self) -> list[str]:
        values = SAMPLE_PRESETS.get(self.preset or "", {})
        other = [
            f"{key} {getattr(self, key)} for {value}" for key, value in values.items() if getattr(self, key) != value
        ]
        return (
            [f"sample.preset is {self.preset}, but other keys are set otherwise: {', '.join(other)}"] if other else []
        )

    def _of_guidance(self) -> list[str]:
        if self.cfg_scale == 1:
            keys = ("guide_ckpt_path", "guide_step", "guide_weights", "cfg_schedule")
            set_here = [key for key in keys if self._differs(key)]
            return [f"sample.{key} is {getattr(self, key)}, but cfg_scale 1 guides nowhere" for key in set_here]
        if self._differs("guide_weights") and not self.guided_by_network:
            why = "neither guide_ckpt_path nor guide_step names a network that guides"
            return [f"sample.guide_weights is {self.guide_weights}, but {why}"]
        return []

    def _differs(self, key: str) -> bool:
        return getattr(self, key) != type(self).model_fields[key].default

    def solver(self) -> str:
        """Solver and grid in words, for what states a result."""
        if self.mode == "meanflow":
            return f"meanflow, {self.mean_steps} step{'s' if self.mean_steps > 1 else ''}"
        return f"{self.mode} {self.sampling_method}, {self.num_sampling_steps} points, shift {self.timestep_shift:g}"

    def guidance(self) -> str:
        """Guidance in words, for what states a result."""
        if self.cfg_scale == 1:
            return "none"
        channels = "all" if self.cfg_channels is None else f"the first {self.cfg_channels}"
        until = "on" if self.cfg_interval_end == 1 else f"to {self.cfg_interval_end:g}"
        growing = "" if self.cfg_schedule == "constant" else f"{self.cfg_schedule} up to "
        by = " by a weaker network" if self.guided_by_network else ""
        start = self.cfg_interval_start
        return f"{growing}scale {self.cfg_scale:g} on {channels} channels from time {start:g} {until}{by}"

    def stated(self) -> dict[str, Any]:
        """The settings for what states a result: without the preset, whose values they are, and without keys that older
        files do not know where they are at their defaults."""
        guides = ("guide_ckpt_path", "guide_step", "guide_weights")
        newer = ("cfg_interval_end", "cfg_schedule", *guides, "compile")
        others = _SOLVER if self.mode == "meanflow" else ("mean_steps",)
        return self.model_dump(exclude={"preset", *others, *(key for key in newer if not self._differs(key))})

    def tuned(self) -> dict[str, Any]:
        """The settings that a model is tuned with and that travel with its weights: solver, grid, guidance."""
        return self.model_dump(include=set(TUNED))

    def over(self, tuned: Mapping[str, Any]) -> "SampleConfig":
        """This section with the settings `tuned` for keys that it does not set itself."""
        given = {key: getattr(self, key) for key in self.model_fields_set}
        return type(self).model_validate({**tuned, **given})


#: Keys of the solvers, without meaning to mode meanflow.
_SOLVER = ("sampling_method", "num_sampling_steps", "timestep_shift", "atol", "rtol")
#: Keys of `SampleConfig.tuned`; a program that reads weights gives them to the preset "model".
TUNED = (
    *("mode", "mean_steps", "sampling_method", "atol", "rtol", "num_sampling_steps", "timestep_shift"),
    *("cfg_scale", "cfg_interval_start", "cfg_interval_end", "cfg_channels", "cfg_schedule"),
    *("guide_ckpt_path", "guide_step", "guide_weights"),
    *("diffusion_form", "diffusion_norm", "last_step", "last_step_size"),
)


def paper_sample(section: SampleConfig) -> SampleConfig:
    """The section under `preset: paper`: three guided channels unless the file says otherwise.

    The published scales, 10.0 after 64 epochs and 6.7 after 800, mean nothing at other channel counts.
    """
    return section if section.cfg_channels is not None else section.model_copy(update={"cfg_channels": 3})


class DataConfig(Section):
    """The `data` section.

    Ours: `latent_flip`, whether half of the samples are mirrored (as published; false where left and right differ in
    meaning), `verify`, whether every checksum of the manifest is compared when the data is opened (null: for less than
    4 GiB, where that takes seconds), `check_statistics`, whether statistics that do not fit the latents are refused
    (false where those of other latents are meant, as in fine-tuning), `num_images`, assumed by a dry run where
    there is no data to count, and two keys about memory:
    `placement` says where training reads its samples: from the files ("host"), or from the devices' memory, over which
    the set is spread at the start ("device", see `lightningdit.device_latents`); "auto" is the latter on GPUs that have
    room for it beside the run. Samples are the same bits; "host" is the default as long as the other has not been
    measured on a GPU. `latent_dtype` is what samples are made of: "bfloat16" rounds what is stored to it before
    anything is computed, wherever it lies, and takes half the memory on devices; "float32" changes nothing, and takes
    no more than what is stored. Validation reads files, and rounds alike.
    """

    data_path: PathText
    valid_path: PathText | None = None
    fid_reference_file: PathText | None = None
    image_size: Size = 256
    num_classes: Classes = 1000
    num_workers: SmallCountFrom0 = 8
    latent_norm: bool = True
    latent_multiplier: Positive = 1.0
    latent_flip: bool = True
    verify: bool | None = None
    check_statistics: bool = True
    num_images: Count = 1_281_167
    placement: Literal["auto", "host", "device"] = "host"
    latent_dtype: Literal["float32", "bfloat16"] = "float32"
