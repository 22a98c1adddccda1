"""Translation of the published tokenizer YAML (LDM style) into the sections of a run file."""

from collections.abc import Mapping
from typing import Any

from common.sections import short
from common.text import nearest

FOUNDATION_MODELS = {"dinov2": "vit_large_patch14_dinov2.lvd142m", "mae": "vit_large_patch16_224.mae"}
PRECISIONS = {32: "float32", "32": "float32", "32-true": "float32", "bf16": "bfloat16", "bf16-mixed": "bfloat16"}

_DDCONFIG = (
    "double_z",
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "dropout",
)
# Published name → ours, where the meaning is the same.
_LOSS = {
    "kl_weight": "kl_weight",
    "disc_weight": "disc_weight",
    "disc_factor": "disc_factor",
    "disc_loss": "disc_loss",
    "disc_num_layers": "disc_n_layers",
    "disc_ndf": "disc_ndf",
    "perceptual_weight": "perceptual_weight",
    "logvar_init": "logvar",
    "vf_weight": "vf_weight",
    "adaptive_vf": "adaptive_vf",
    "cos_margin": "cos_margin",
    "distmat_margin": "distmat_margin",
    "distmat_weight": "distmat_weight",
    "cos_weight": "cos_weight",
}
# Defaults of the published loss, also for null.
_LOSS_DEFAULTS = {"distmat_margin": 0.0, "cos_margin": 0.0, "adaptive_vf": False, "disc_weight": 1.0, "kl_weight": 1.0}


def disc_start_in_iterations(published: int) -> int:
    """Convert `disc_start` of a published config to iterations: half of it, rounded up (5001 → 2501).

    The published trainer steps two optimizers per batch and counts both, so the generator's pass over batch i (from 0)
    sees the count 2·i and has the GAN terms from `2·i >= disc_start` on. (The discriminator's pass sees 2·i + 1: for an
    odd `disc_start` it began one batch before the generator used it; here both begin with the generator.)
    """
    return (published + 1) // 2


class _Reader:
    """Reads nested mappings, refuses unknown keys and notes ignored ones."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def section(self, parent: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
        value = parent.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}{key}: a mapping of keys to values is wanted (got {short(value)})")
        return value

    def integer(self, section: Mapping[str, Any], key: str, where: str) -> int:
        """A whole number; 1 where the key is absent or null."""
        value = section.get(key)
        if value is None:
            return 1
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{where}{key}: a whole number is wanted (got {short(value)})")
        return value

    def allow(self, section: Mapping[str, Any], where: str, used: tuple[str, ...], ignored: tuple[str, ...] = ()):
        """Every key must be one of `used` or `ignored`; the ignored ones that are there are noted."""
        for key, value in section.items():
            if key in ignored:
                self.notes.append(f"ignored {where}{key}: {value!r}")
            elif key not in used:
                known = (*used, *ignored)
                raise ValueError(f"unknown key {where}{key}{nearest(str(key), known)}; known: {', '.join(known)}")


def from_published(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The sections `preset, ckpt_path, model, foundation, loss, data, train, optimizer` of a published tokenizer YAML.

    Args:
        document: the parsed YAML (keys `ckpt_path, weight_init, model, data, lightning`).

    Returns:
        The sections, as plain values for the configs to check, with only the keys the file decides; and notes on what
        was ignored or converted. `foundation` is absent where the file uses no foundation model. `vf_weight` and
        `disc_start` are None where the file leaves them open: the published loss has no value for them, and training
        needs one.

    Raises:
        ValueError: an unknown key, named with the nearest known one.
    """
    read = _Reader()
    read.allow(document, "", ("ckpt_path", "weight_init", "model", "data", "lightning"))
    model = read.section(document, "model", "")
    read.allow(model, "model.", ("base_learning_rate", "params"), ("target",))
    params = read.section(model, "params", "model.")
    read.allow(
        params,
        "model.params.",
        ("embed_dim", "use_vf", "reverse_proj", "proj_fix", "lossconfig", "ddconfig"),
        ("monitor",),
    )
    ddconfig = read.section(params, "ddconfig", "model.params.")
    read.allow(ddconfig, "model.params.ddconfig.", _DDCONFIG)
    data, train = _data_and_train(read, document)
    sections = {
        "preset": "paper",
        "ckpt_path": document.get("ckpt_path"),
        "model": {"embed_dim": params.get("embed_dim"), **ddconfig},
        "foundation": _foundation(params),
        "data": {**data, "image_size": ddconfig.get("resolution", 256)},
        "train": {**train, "weight_init": document.get("weight_init")},
        "optimizer": {"lr": model.get("base_learning_rate")},
    }
    given = {name: value for name, value in sections.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, dict):
            given[name] = {key: v for key, v in value.items() if v is not None}
    return given | {"loss": _loss(read, params)}, read.notes


def _foundation(params: Mapping[str, Any]) -> dict[str, Any] | None:
    name = params.get("use_vf")
    if name is None:
        return None
    if not isinstance(name, str) or name not in FOUNDATION_MODELS:
        raise ValueError(f"model.params.use_vf: {name!r} is not one of {', '.join(FOUNDATION_MODELS)}")
    return {"model_name": FOUNDATION_MODELS[name]}  # which `preset: paper` feeds [−1, 1]


def _loss(read: _Reader, params: Mapping[str, Any]) -> dict[str, Any]:
    lossconfig = read.section(params, "lossconfig", "model.params.")
    read.allow(lossconfig, "model.params.lossconfig.", ("params",), ("target",))
    given, where = read.section(lossconfig, "params", "model.params.lossconfig."), "model.params.lossconfig.params."
    read.allow(given, where, ("disc_start", "pp_style", *_LOSS), ("vf_loss_type",))
    loss = _LOSS_DEFAULTS | {_LOSS[key]: value for key, value in given.items() if key in _LOSS and value is not None}
    for key in _LOSS_DEFAULTS:
        if key in given and given[key] is None:
            read.notes.append(f"{where}{key} is null: {loss[key]}, as the published loss has it then")
    loss["reconstruction"] = "mean" if given.get("pp_style") else "sum"
    loss["use_vf"] = params.get("use_vf") is not None
    for key in ("reverse_proj", "proj_fix"):
        loss[key] = False if params.get(key) is None else params[key]
    loss.setdefault("vf_weight", None)
    loss["disc_start"] = None
    if given.get("disc_start") is not None:
        start = read.integer(given, "disc_start", where)
        loss["disc_start"] = disc_start_in_iterations(start)
        read.notes.append(f"disc_start {start} counts steps of both optimizers: {loss['disc_start']} iterations")
    return loss


def _data_and_train(read: _Reader, document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    data = read.section(document, "data", "")
    read.allow(data, "data.", ("params",), ("target",))
    params = read.section(data, "params", "data.")
    read.allow(params, "data.params.", ("batch_size", "num_workers", "train", "validation"), ("wrap",))
    ours = {"num_workers": params.get("num_workers")}
    for split, key in (("train", "data_path"), ("validation", "valid_path")):
        where = f"data.params.{split}."
        dataset = read.section(params, split, "data.params.")
        read.allow(dataset, where, ("params",), ("target",))
        given = read.section(dataset, "params", where)
        read.allow(given, f"{where}params.", ("data_root",))
        ours[key] = given.get("data_root")
    lightning = read.section(document, "lightning", "")
    read.allow(lightning, "lightning.", ("trainer",))
    trainer = read.section(lightning, "trainer", "lightning.")
    where = "lightning.trainer."
    read.allow(trainer, where, ("devices", "num_nodes", "max_epochs", "precision"), ("strategy", "accelerator"))
    precision = 32 if trainer.get("precision") is None else trainer["precision"]
    if not isinstance(precision, int | str) or precision not in PRECISIONS:
        raise ValueError(f"{where}precision: {precision!r} is not one of {', '.join(map(repr, PRECISIONS))}")
    train = {"max_epochs": trainer.get("max_epochs"), "precision": PRECISIONS[precision]}
    if params.get("batch_size") is not None:
        per_gpu = read.integer(params, "batch_size", "data.params.")
        devices, nodes = read.integer(trainer, "devices", where), read.integer(trainer, "num_nodes", where)
        total = train["global_batch_size"] = per_gpu * devices * nodes
        read.notes.append(f"global batch {per_gpu} per GPU × {devices} devices × {nodes} nodes = {total}")
    return ours, train
