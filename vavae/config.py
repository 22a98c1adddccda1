"""Config sections of a tokenizer run: typed, frozen, without unknown keys.

Values are checked on construction; nothing here touches a file or a device. The published tokenizer YAML is read by
`vavae.published`.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from common.sections import (
    Count,
    CountFrom0,
    Float,
    Levels,
    NonNegative,
    PathText,
    Positive,
    Probability,
    Section,
    Size,
    Sizes,
    SmallCount,
    SmallCountFrom0,
    Text,
)
from common.text import nearest

GROUPS = 32  # of every GroupNorm in the autoencoder
MAX_WIDTH = 65_536
LPIPS_MIN_SIZE = 16


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

    shorthands = ("size",)

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "f16d16": {"embed_dim": 16, "z_channels": 16},
        "f16d32": {"embed_dim": 32, "z_channels": 32},
        "f16d64": {"embed_dim": 64, "z_channels": 64},
        # Tokenizers of other works that have the same layout of weights.
        "mar-f16d16": {"embed_dim": 16, "z_channels": 16, "decoder_attn_resolutions": ()},
        "sd-f8d4": {"embed_dim": 4, "z_channels": 4, "ch_mult": (1, 2, 4, 4), "attn_resolutions": ()},
    }

    embed_dim: Size = 32
    ch: Size = 128
    ch_mult: Sizes = Field((1, 1, 2, 2, 4), min_length=1, max_length=12)
    num_res_blocks: Levels = 2
    attn_resolutions: Sizes = (16,)
    decoder_attn_resolutions: Sizes | None = None
    resolution: Size = 256
    in_channels: Size = 3
    out_ch: Size = 3
    z_channels: Size = 32
    double_z: Literal[True] = True
    dropout: Probability = 0.0

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, data: Any) -> Any:
        """`size: f16d32` stands for the fields of that size; fields written beside it win."""
        if not isinstance(data, Mapping) or "size" not in data:
            return data
        fields = dict(data)
        size = fields.pop("size")
        if not isinstance(size, str) or size not in cls.SIZES:
            raise ValueError(
                f"size: unknown tokenizer size {size!r}{nearest(str(size), cls.SIZES)}; known: {', '.join(cls.SIZES)}"
            )
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
            if self.ch * multiple > MAX_WIDTH:
                raise ValueError(f"ch {self.ch} × ch_mult {multiple} is more than {MAX_WIDTH:,} channels")
        ratio = self.downsample_ratio
        if self.resolution % ratio:
            raise ValueError(f"resolution {self.resolution} is not a multiple of the down-sampling {ratio}")
        for name in ("attn_resolutions", "decoder_attn_resolutions"):
            for size in getattr(self, name) or ():
                if size not in self.level_resolutions:
                    raise ValueError(f"{name}: no level works at {size}; levels are at {list(self.level_resolutions)}")
        return self


class ModelArgs(Section):
    """Arguments of timm's vision transformers that say what network it is; none that names a file or code.

    Which of them a model takes is timm's: those after `dynamic_img_size` are of its models with rotary positions
    (EVA-02, DINOv3, PE), the last ones of those with windows (SAM). `img_size` is that of the positions in
    the weights for models that cannot be built for another; others hold positions for the size they are fed, unless
    `dynamic_img_size` is true: then they interpolate them in each pass.
    """

    img_size: Size | None = None
    patch_size: Size | None = None
    embed_dim: Size | None = None
    depth: SmallCount | None = None
    num_heads: SmallCount | None = None
    mlp_ratio: Positive | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    proj_bias: bool | None = None
    init_values: NonNegative | None = None
    class_token: bool | None = None
    reg_tokens: SmallCountFrom0 | None = None
    no_embed_class: bool | None = None
    pre_norm: bool | None = None
    final_norm: bool | None = None
    fc_norm: bool | None = None
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map"] | None = None
    dynamic_img_size: Literal[True] | None = None
    dynamic_img_pad: bool | None = None

    num_reg_tokens: SmallCountFrom0 | None = None
    qkv_fused: bool | None = None
    attn_type: Literal["eva", "rope"] | None = None
    swiglu_mlp: bool | None = None
    scale_mlp: bool | None = None
    scale_attn_inner: bool | None = None
    use_abs_pos_emb: bool | None = None
    use_rot_pos_emb: bool | None = None
    rope_type: Literal["cat", "mixed", "dinov3"] | None = None
    rope_grid_offset: Float | None = None
    rope_grid_indexing: Literal["ij", "xy"] | None = None
    rope_temperature: Positive | None = None
    rope_rotate_half: bool | None = None
    ref_feat_shape: Size | None = None
    use_post_norm: bool | None = None
    use_pre_transformer_norm: bool | None = None
    use_post_transformer_norm: bool | None = None
    use_fc_norm: bool | None = None

    use_abs_pos: bool | None = None
    use_rel_pos: bool | None = None
    use_rope: bool | None = None
    window_size: SmallCountFrom0 | None = None
    global_attn_indexes: tuple[SmallCountFrom0, ...] | None = Field(None, strict=False)
    neck_chans: Size | None = None


class FoundationConfig(Section):
    """The frozen network whose features the latents are aligned to.

    Fields:
        model_name: a short name of `vavae.foundation.names` (dinov2-l, siglip2-b, …) or a name of timm's, with the tag
            of its weights; without one, timm's default tag is meant, and the log says which.
        weights: local checkpoint (.safetensors, .pt, .pth) in timm's layout, or in that of the model's authors where
            timm converts it; null downloads timm's own.
        input_size: images are resized to this many pixels; null takes what gives one feature per latent position, or,
            for models of one size, theirs. Features of another grid are resampled to the latents'.
        normalization: of images from −1 to 1: `model` brings them to the mean and standard deviation that timm states
            for the named weights, `imagenet` to ImageNet's (for DINOv2, DINOv3, MAE and SAM both are the same),
            `published` leaves them as they are, as the published tokenizers were trained. A file without the key under
            `preset: paper` means `published`.
        model_args: further arguments of the timm model, those of `ModelArgs`.
    """

    model_name: Text = "vit_large_patch14_dinov2.lvd142m"
    weights: PathText | None = None
    input_size: Size | None = None
    normalization: Literal["model", "imagenet", "published"] = "model"
    model_args: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("model_args")
    @classmethod
    def _architecture_only(cls, values: dict) -> dict:
        ModelArgs.read(values, "timm's vision transformer")
        return values


class LossConfig(Section):
    """The terms of the tokenizer's loss (arXiv 2501.01423, section 3.2) and their weights.

    Fields:
        reconstruction: `sum` adds errors over the pixels of an image, `mean` averages them (`pp_style`: then KL is
            averaged too, and twice as large).
        logvar: constant log variance of the reconstruction likelihood.
        disc_start: the GAN terms begin after this many ITERATIONS of the run (batches, not optimizer steps).
        disc_start, vf_weight: null where a file does not set them; training refuses that.
        disc_weight, disc_factor: the GAN term is `disc_weight × adaptive weight × disc_factor`; 0 trains without one.
        perceptual_weights: local VGG-16 weights (torchvision layout) for LPIPS; null downloads torchvision's.
        reverse_proj: project latents to the features' width (true) or features to the latents' (false).
        proj_fix: leave that projection as it was initialised.
    """

    reconstruction: Literal["sum", "mean"] = "sum"
    logvar: Float = 0.0
    kl_weight: NonNegative = 1e-6
    perceptual: Literal["lpips", "none"] = "lpips"
    perceptual_weight: NonNegative = 1.0
    perceptual_weights: PathText | None = None
    disc_start: CountFrom0 | None = 2501
    disc_weight: NonNegative = 0.5
    disc_factor: NonNegative = 1.0
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    disc_ndf: Size = 64
    disc_n_layers: Levels = 3
    use_vf: bool = True
    vf_weight: NonNegative | None = 0.1
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

    @property
    def aligns(self) -> bool:
        """Whether the VF term weighs anything."""
        return self.use_vf and self.vf_weight != 0 and (self.distmat_weight > 0 or self.cos_weight > 0)


class StageLoss(Section):
    """Overrides of the loss in a stage; null keeps the run's value."""

    kl_weight: NonNegative | None = None
    perceptual_weight: NonNegative | None = None
    vf_weight: NonNegative | None = None
    distmat_weight: NonNegative | None = None
    cos_weight: NonNegative | None = None
    distmat_margin: NonNegative | None = None
    cos_margin: NonNegative | None = None


class StageConfig(Section):
    """A stage of the run: `epochs` epochs with overrides of the loss."""

    epochs: Count
    loss: StageLoss = StageLoss()


def loss_at(loss: LossConfig, stages: Iterable[StageConfig], epoch: float) -> LossConfig:
    """The loss after `epoch` epochs, which may be a fraction; the last stage has no end."""
    changes, end = {}, 0
    for stage in stages:
        changes, end = stage.loss.model_dump(exclude_none=True), end + stage.epochs
        if epoch < end:
            break
    return loss.model_copy(update=changes)


class DataConfig(Section):
    """Images with labels, and how they become batches.

    Fields:
        data_path: a folder with a sub-folder for each class, ImageNet as it is unpacked, WebDataset tars (a pattern
            such as `train-{000..137}.tar`, or a folder of them), or a list of files (`.txt`, `.tsv`: path, tab, label
            a line); see `vavae.sources`. Null where a file is read for its weights alone.
        class_file: names of the classes, one a line, in the order of their labels; null sorts names as text.
        labels_file: labels of ImageNet's flat validation folder (of `valid_path` where both paths are given); null
            looks for them beside it.
        num_classes: required number of classes; null accepts any.
        decoder: `pil` gives the published pixels; `torchvision` and `dali` read JPEG files faster, on the device that
            trains; `auto` chooses and says why (`vavae.decoders`). A file without the key under `preset: paper` means
            `pil`.
        exif_rotation: turn photographs as the camera was held (TIFF files are always turned, by Pillow). A file without
            the key under `preset: paper` means false.
        crop: `random` resizes the short side to `image_size` and crops anywhere; `center` is ADM's centre crop;
            `published_eval` is the crop under which the published tokenizers were evaluated.
        flip: mirror half of the training images.
        on_unreadable: `error` stops at a broken file and names it; `skip` takes the next readable image and counts it.
        max_unreadable: where files are skipped: stop once more than this share of those read so far (of at least
            10,000, or of all) is broken.
        cache: keep all decoded images in memory (small sets).
        num_images: assumed by a dry run where there is no data to count.
    """

    data_path: PathText | None = None
    valid_path: PathText | None = None
    class_file: PathText | None = None
    labels_file: PathText | None = None
    image_size: Size = 256
    num_workers: SmallCountFrom0 = 8
    num_classes: Count | None = None
    decoder: Literal["auto", "dali", "torchvision", "pil"] = "auto"
    exif_rotation: bool = True
    crop: Literal["random", "center", "published_eval"] = "random"
    flip: bool = False
    on_unreadable: Literal["error", "skip"] = "error"
    max_unreadable: Annotated[Float, Field(ge=0, le=1)] = 0.05
    cache: bool = False
    num_images: Count = 1_281_167

    @model_validator(mode="after")
    def _decoder_serves(self) -> Self:
        if self.decoder in ("dali", "torchvision"):
            if self.crop == "published_eval":
                raise ValueError(
                    f"decoder is {self.decoder}, but crop published_eval is Pillow's alone: use pil or auto"
                )
            if self.cache:
                raise ValueError(f"decoder is {self.decoder}, but cache keeps what Pillow scaled: use pil or auto")
        return self

    def as_published(self) -> "DataConfig":
        """The section as `preset: paper` means it: the published pixels, unless it says otherwise."""
        unsaid = {"decoder": "pil", "exif_rotation": False}
        update = {key: value for key, value in unsaid.items() if key not in self.model_fields_set}
        return self.model_copy(update=update)

    def for_evaluation(self, path: str | None = None) -> "DataConfig":
        """The section with every image whole and in the middle, at `path` where one is given."""
        update = {"crop": "center", "flip": False}
        return self.model_copy(update=update if path is None else update | {"data_path": path})

    @property
    def folder(self) -> str:
        """`data_path`; raises ValueError where it is null."""
        if self.data_path is None:
            raise _not_set("data.data_path")
        return self.data_path


# Key that a published file may not set → its name there.
_PUBLISHED = {
    "data.data_path": "data.params.train.params.data_root",
    "loss.vf_weight": "model.params.lossconfig.params.vf_weight",
    "loss.disc_start": "model.params.lossconfig.params.disc_start, which counts the steps of both optimizers",
}


def _not_set(*keys: str) -> ValueError:
    return ValueError("not set: " + "; ".join(f"{key} (in a published file {_PUBLISHED[key]})" for key in keys))


def balances_both(loss: LossConfig, stages: Iterable[StageConfig]) -> bool:
    """Whether some step balances the VF and the GAN term, for which the decoder has two backward passes."""
    losses = [loss_at(loss, [stage], 0) for stage in stages] or [loss]
    return loss.use_gan and loss.adaptive_vf and any(each.aligns for each in losses)


def check_sections(
    model: AutoencoderConfig,
    foundation: FoundationConfig | None,
    loss: LossConfig,
    data: DataConfig,
    stages: Iterable[StageConfig] = (),
) -> None:
    """Raise ValueError, naming the keys, where sections of a training run contradict each other or lack a value."""
    weights = [loss_at(loss, [stage], 0).vf_weight for stage in stages] or [loss.vf_weight]
    missing = {
        "data.data_path": data.data_path is None,
        "loss.vf_weight": loss.use_vf and None in weights,
        "loss.disc_start": loss.use_gan and loss.disc_start is None,
    }
    if any(missing.values()):
        raise _not_set(*(key for key, is_missing in missing.items() if is_missing))
    if data.image_size % model.downsample_ratio:
        raise ValueError(
            f"data.image_size {data.image_size} is not a multiple of the tokenizer's down-sampling "
            f"{model.downsample_ratio}"
        )
    if model.in_channels != 3 or model.out_ch != 3:
        raise ValueError(f"model.in_channels {model.in_channels} and model.out_ch {model.out_ch}: images have 3")
    if loss.use_vf and foundation is None:
        raise ValueError("loss.use_vf is true, but the run has no foundation section: add one or set loss.use_vf false")
    # Each strided convolution of the discriminator halves the image, rounding down; two more take off 1 each.
    min_size = 3 * 2**loss.disc_n_layers
    if loss.use_gan and data.image_size < min_size:
        raise ValueError(
            f"data.image_size {data.image_size} is too small for a discriminator with loss.disc_n_layers "
            f"{loss.disc_n_layers}, which needs {min_size}: use fewer layers, or loss.disc_weight 0"
        )
    if loss.perceptual == "lpips" and data.image_size < LPIPS_MIN_SIZE:
        raise ValueError(
            f"data.image_size {data.image_size} is too small for LPIPS, which halves images "
            f"four times: at least {LPIPS_MIN_SIZE}, or loss.perceptual none"
        )
