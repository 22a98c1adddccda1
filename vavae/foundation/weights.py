"""Weights of a foundation model from a local file: in timm's layout, or in another that timm converts to it."""

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import cast

import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.tensors import Tensors, WeightsError, load_strict, read_tensors
from vavae.foundation.registry import Plan, create, drop_heads

log = logging.getLogger(__name__)

#: Where published files of these models keep their tensors, if not at the top.
ENTRIES = ("state_dict", "model_ema", "model", "module", "ema")
#: Parts of a model that features do not go through. A model's own parts of these names are kept.
HEADS = ("head.", "head_dist.", "attn_pool.", "fc_norm.")
_PATCH_KEYS = ("patch_embed.proj.weight", "patch_embed.projection.weight", "conv1.weight")


def build_from_file(plan: Plan, path: str) -> nn.Module:
    """The model of a plan, without heads, with the weights of a file; all of them, and of nothing else.

    The file is in timm's layout or, where timm has a conversion for the model (DINOv2's, MAE's, CLIP's, SAM's own), in
    that of its authors. Positions of another grid are interpolated, as timm does.

    Raises:
        WeightsError: no file, an unreadable one, or one of another model; it names the file and the model.
    """
    tensors = read_tensors(path, ENTRIES)
    # Weights that are about to be overwritten need no initialisation; buffers that no file holds do.
    with _parameters_on_meta():
        model = create(plan.name, plan.arguments)
    drop_heads(model)
    source = f"{path} as timm model {plan.name} (in timm's layout, or its authors')"
    converted = _converted(model, tensors, plan.name, source)
    kept = {key: value for key, value in converted.items() if key in model.state_dict() or not key.startswith(HEADS)}
    if len(kept) < len(converted):
        log.info("%s: left out %d tensors of heads", path, len(converted) - len(kept))
    model._apply(lambda value: torch.empty_like(value, device="cpu") if value.is_meta else value)
    load_strict(model, kept, source)
    return model


def _converted(model: nn.Module, tensors: Tensors, name: str, source: str) -> Tensors:
    """The tensors as timm names and shapes them, by the conversion that stands in the model's source file."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    for key, value in tensors.items():  # timm would interpolate those too
        if patch and key.endswith(_PATCH_KEYS) and value.ndim == 4 and tuple(value.shape[2:]) != tuple(patch):
            raise WeightsError(
                f"{source} does not fit: {key} has patches of {value.shape[2]} × {value.shape[3]} pixels where the "
                f"model has {patch[0]} × {patch[1]}"
            )
    module = sys.modules[timm.model_entrypoint(name.partition(".")[0]).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        with redirect_stdout(io.StringIO()):  # one of them prints
            converted = convert(dict(tensors), model)
            return convert(converted, model)  # that of PE interpolates positions only in timm's own layout
    except Exception as error:  # of any kind, on names or shapes that it does not expect
        raise WeightsError(f"{source} does not fit: timm cannot convert it: {error!r}") from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the context, parameters of new modules hold no memory and take no time; buffers are as always."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(cast(Callable[..., None], to_meta))  # its type forgets it
    try:
        yield
    finally:
        handle.remove()
