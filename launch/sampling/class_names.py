"""Names of classes beside labels: a model's own, or ImageNet's."""

import hashlib
from collections.abc import Sequence

#: Of the WordNet ids of ImageNet-1k's classes, a line each, as timm's `ImageNetInfo` lists them.
_IDS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
IMAGENET_CLASSES = 1000


def class_captions(names: Sequence[str] | None, num_classes: int) -> list[str]:
    """What is written beside images of each class: "207 golden retriever".

    names: the model's own. Of a model of 1000 classes without any, or whose names are their WordNet ids,
    they are those of ImageNet-1k, in the words of torchvision; other models have the label alone, or beside its id.
    """
    if num_classes == IMAGENET_CLASSES and (names is None or _are_imagenet_ids(names)):
        names = imagenet_names()
    if names is None:
        return [str(label) for label in range(num_classes)]
    return [f"{label} {name}" for label, name in enumerate(names)]


def _are_imagenet_ids(names: Sequence[str]) -> bool:
    return hashlib.sha256("\n".join(names).encode()).hexdigest() == _IDS_SHA256


def imagenet_names() -> tuple[str, ...]:
    """The 1000 names of ImageNet-1k's classes, in the order of their WordNet ids, which is that of labels."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
