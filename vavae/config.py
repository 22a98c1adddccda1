"""What a tokenizer run may say: typed, frozen sections that know no unknown key.

Values are checked when they are made; nothing here touches a file or a device. The published tokenizer YAML is read by
`vavae.published`.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

GROUPS = 32  # of every GroupNorm in the autoencoder


def nearest(key: str, known: Iterable[str]) -> str:
    """How to end an error about an unknown key: the most similar known one, or all of them."""
    known = sorted(known)
    match = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}"


def _number(value: Any) -> Any:
    """YAML 1.1 reads a float without a dot (1e-6) as text; take it as the number it spells."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _sequence(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Number = Annotated[float, BeforeValidator(_number)]
NonNegative = Annotated[float, BeforeValidator(_number), Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_sequence)]


class Section(BaseModel):
    """A frozen part of a run file. An unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}: {nearest(str(key), cls.model_fields)}")
        return data


class AutoencoderConfig(Section):
    """The KL autoencoder (fields as in the published model and its `ddconfig`); the defaults are f16d32.

    `AutoencoderConfig(size="f16d64", dropout=0.1)` starts from a size of `SIZES`.

    Fields:
        embed_dim, z_channels: channels of the latents, and of the networks' ends before the 1×1 convolutions.
        ch, ch_mult: width of the first level and each level's multiple of it; every level but the last halves the size.
        num_res_blocks: residual blocks of an encoder level (a decoder level has one more).
        attn_resolutions: image sizes (in pixels, for images of `resolution`) of the levels with attention.
        decoder_attn_resolutions: the same for the decoder where it differs (null: as `attn_resolutions`).
    """

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "f16d16": {"embed_dim": 16, "z_channels": 16},
        "f16d32": {"embed_dim": 32, "z_channels": 32},
        "f16d64": {"embed_dim": 64, "z_channels": 64},
        # Tokenizers of other works that have the same layout of weights.
        "mar-f16d16": {"embed_dim": 16, "z_channels": 16, "decoder_attn_resolutions": ()},
        "sd-f8d4": {"embed_dim": 4, "z_channels": 4, "ch_mult": (1, 2, 4, 4), "attn_resolutions": ()},
    }

    embed_dim: Count = 32
    ch: Count = 128
    ch_mult: Counts = Field((1, 1, 2, 2, 4), min_length=1)
    num_res_blocks: Count = 2
    attn_resolutions: Counts = (16,)
    decoder_attn_resolutions: Counts | None = None
    resolution: Count = 256
    in_channels: Count = 3
    out_ch: Count = 3
    z_channels: Count = 32
    double_z: Literal[True] = True
    dropout: Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, data: Any) -> Any:
        """`size: f16d32` stands for the fields of that size; fields written beside it win."""
        if not isinstance(data, Mapping) or "size" not in data:
            return data
        fields = dict(data)
        size = fields.pop("size")
        if size not in cls.SIZES:
            raise ValueError(f"size: unknown tokenizer size {size!r}; {nearest(str(size), cls.SIZES)}")
        return {**cls.SIZES[size], **fields}

    @property
    def downsample_ratio(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        """Image size at each level, for images of `resolution`."""
        return tuple(self.resolution // 2**level for level in range(len(self.ch_mult)))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for multiple in self.ch_mult:
            if self.ch * multiple % GROUPS:
                raise ValueError(f"ch {self.ch} × ch_mult {multiple} is not a multiple of the {GROUPS} norm groups")
        ratio = self.downsample_ratio
        if self.resolution % ratio:
            raise ValueError(f"resolution {self.resolution} is not a multiple of the down-sampling {ratio}")
        for name in ("attn_resolutions", "decoder_attn_resolutions"):
            for size in getattr(self, name) or ():
                if size not in self.level_resolutions:
                    raise ValueError(f"{name}: no level works at {size}; levels are at {list(self.level_resolutions)}")
        return self


class FoundationConfig(Section):
    """The frozen vision transformer whose features the latents are aligned to.

    Fields:
        model_name: a timm vision transformer.
        weights: local checkpoint in timm's layout (.safetensors, .pt, .pth); null downloads timm's own.
        input_size: images are resized to this many pixels; null takes what gives one token per latent position.
        normalization: `imagenet` converts [−1, 1] to ImageNet's mean and standard deviation, as the published vision
            models were trained; `published` feeds [−1, 1] as it is, as the published tokenizers were trained.
        model_args: further arguments of the timm model, such as img_size, patch_size, embed_dim, depth, num_heads.
    """

    model_name: str = "vit_large_patch14_dinov2.lvd142m"
    weights: str | None = None
    input_size: Count | None = None
    normalization: Literal["imagenet", "published"] = "imagenet"
    model_args: dict[str, JsonValue] = Field(default_factory=dict)


class LossConfig(Section):
    """The terms of the tokenizer's loss (arXiv 2501.01423, section 3.2) and their weights.

    Fields:
        reconstruction: `sum` adds errors over the pixels of an image, `mean` averages them (`pp_style`: then KL is
            averaged too, and twice as large).
        logvar: constant log variance of the reconstruction likelihood.
        disc_start: the GAN terms begin after this many ITERATIONS of the run (batches, not optimizer steps).
        disc_weight, disc_factor: the GAN term is `disc_weight × adaptive weight × disc_factor`; 0 trains without one.
        perceptual_weights: local VGG-16 weights (torchvision layout) for LPIPS; null downloads torchvision's.
        reverse_proj: project latents to the features' width (true) or features to the latents' (false).
        proj_fix: leave that projection as it was initialised.
    """

    reconstruction: Literal["sum", "mean"] = "sum"
    logvar: Number = 0.0
    kl_weight: NonNegative = 1e-6
    perceptual: Literal["lpips", "none"] = "lpips"
    perceptual_weight: NonNegative = 1.0
    perceptual_weights: str | None = None
    disc_start: Annotated[int, Field(ge=0)] = 2501
    disc_weight: NonNegative = 0.5
    disc_factor: NonNegative = 1.0
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    disc_ndf: Count = 64
    disc_n_layers: Count = 3
    use_vf: bool = True
    vf_weight: NonNegative = 0.1
    adaptive_vf: bool = True
    distmat_weight: NonNegative = 1.0
    cos_weight: NonNegative = 1.0
    distmat_margin: NonNegative = 0.25
    cos_margin: NonNegative = 0.5
    reverse_proj: bool = True
    proj_fix: bool = False

    @property
    def use_gan(self) -> bool:
        return self.disc_weight > 0 and self.disc_factor > 0


class StageLoss(Section):
    """What a stage changes in the loss; null keeps the run's value."""

    kl_weight: NonNegative | None = None
    perceptual_weight: NonNegative | None = None
    vf_weight: NonNegative | None = None
    distmat_weight: NonNegative | None = None
    cos_weight: NonNegative | None = None
    distmat_margin: NonNegative | None = None
    cos_margin: NonNegative | None = None


class StageConfig(Section):
    """A part of the run: so many epochs under a changed loss."""

    epochs: Count
    loss: StageLoss = StageLoss()


def loss_at(loss: LossConfig, stages: Iterable[StageConfig], epoch: float) -> LossConfig:
    """The loss in force after `epoch` epochs (a fraction is fine); the last stage goes on for ever."""
    changes, end = {}, 0
    for stage in stages:
        changes, end = stage.loss.model_dump(exclude_none=True), end + stage.epochs
        if epoch < end:
            break
    return loss.model_copy(update=changes)


class DataConfig(Section):
    """A folder of images, one sub-folder a class.

    Fields:
        crop: `random` resizes the short side to `image_size` and crops anywhere; `center` is ADM's centre crop;
            `published_eval` is the crop under which the published tokenizers were evaluated.
        num_classes: what the number of sub-folders must be; null accepts any.
        on_unreadable: `error` stops at a broken file and names it; `skip` takes the next readable image and counts it.
        cache: keep all decoded images in memory (small sets).
        num_images: what a plan assumes where there is no data to count.
    """

    data_path: str
    valid_path: str | None = None
    image_size: Count = 256
    num_workers: Annotated[int, Field(ge=0)] = 8
    num_classes: Count | None = None
    crop: Literal["random", "center", "published_eval"] = "random"
    on_unreadable: Literal["error", "skip"] = "error"
    cache: bool = False
    num_images: Count = 1_281_167
