"""What a slider moves through: pictures of training by step, and sets of samples by class."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from launch.evaluation.npz_file import LABELS, NpzImages, npz_names, read_npy, read_npz
from launch.gallery_page.media import Embedder, PageFull
from launch.gallery_page.sources import Sources, reason
from vavae.image_files import FORMATS, UnreadableImage, open_image

MOST_POSITIONS = 24  # of a slider
MOST_CLASSES, IMAGES_OF_A_CLASS = 12, 8
_PICTURE = re.compile(r"step_(\d{7,})\.png")
_BY_INDEX = "index modulo number of classes"  # as `sample` describes labels that go through all classes
View = dict[str, Any]


def spread(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    places = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[place] for place in places]


def training_views(runs: Mapping[str, Path], embedder: Embedder, left_out: dict[Path, str]) -> list[View]:
    """A slider over steps for each kind of picture, such as previews, with a track for each run that has them.

    A position shows, of each run, the last picture made up to its step.
    """
    kinds: dict[str, dict[str, dict[int, Path]]] = defaultdict(dict)
    for run, directory in runs.items():
        for kind, pictures in _pictures_of_training(directory).items():
            kinds[kind][run] = pictures
    views = []
    for kind, by_run in sorted(kinds.items()):
        all_steps = sorted({step for pictures in by_run.values() for step in pictures})
        steps = spread(all_steps, MOST_POSITIONS)
        tracks = [_track(kind, run, pictures, steps, embedder, left_out) for run, pictures in by_run.items()]
        tracks = [track for track in tracks if track["items"]]
        if tracks:
            labels = [f"{step:,}" for step in steps]
            views.append({"title": kind, "unit": "step", "labels": labels, "tracks": tracks, "of": len(all_steps)})
    return views


def _pictures_of_training(directory: Path) -> dict[str, dict[int, Path]]:
    """Kind → step → file, of `<kind>/step_<step>.png` in a run's directory."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(directory.glob("*/step_*.png")):
        if (name := _PICTURE.fullmatch(path.name)) and path.is_file():
            found.setdefault(path.parent.name, {})[int(name[1])] = path
    return found


def _track(kind, run, pictures: dict[int, Path], steps: list[int], embedder, left_out) -> View:
    items: list[View] = []
    shown = None
    for place, upto in enumerate(steps):
        step = max((step for step in pictures if step <= upto), default=None)
        if step is None or step == shown:
            continue
        shown = step
        try:
            picture = embedder.embed(open_image(pictures[step]))
        except (UnreadableImage, PageFull) as e:
            left_out[pictures[step]] = reason(pictures[step], e)
            continue
        items.append({"at": place, "picture": picture, "alt": f"{kind} of {run} at step {step:,}", "step": step})
    return {"name": run, "items": items}


def other_pictures(paths: Iterable[Path], names: Mapping[Path, str], embedder, left_out) -> list[View]:
    """Pictures that lie beside runs and samples, with their names."""
    found = []
    for path in paths:
        try:
            found.append({"name": names[path], "picture": embedder.embed(open_image(path))})
        except (UnreadableImage, PageFull) as e:
            left_out[path] = reason(path, e)
    return found


def samples_view(sources: Sources, names: Mapping[Path, str], embedder: Embedder) -> View | None:
    """A slider over sets of samples, by the step of their weights, each by class; None where there are none.

    Sets of latents are passed over: they hold no images.
    """
    folders = [folder for folder, facts in sources.samples.items() if "latents_manifest" not in facts]
    folders.sort(key=lambda folder: (_number(sources.samples[folder].get("step")), names[folder]))
    items: list[View] = []
    for folder in (shown := spread(folders, MOST_POSITIONS)):
        facts = sources.samples[folder]
        try:
            classes, total = _by_class(folder, facts, embedder)
        except (ValueError, OSError, EOFError) as e:
            sources.left_out[folder] = reason(folder, e)
            continue
        items.append({"at": len(items), "name": names[folder], "facts": facts, "classes": classes, "total": total})
    if not items:
        return None
    captions = {row["label"]: row["caption"] for item in items for row in item["classes"]}
    return {
        "unit": "set",
        "labels": [_set_label(item["name"], item["facts"]) for item in items],
        "tracks": [{"name": "", "items": items}],
        "captions": dict(sorted(captions.items())),
        "of": len(items) if len(shown) == len(folders) else len(folders),  # a set that cannot be read thins nothing out
    }


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _set_label(name: str, facts: Mapping[str, Any]) -> str:
    step = facts.get("step")
    return f"{name}, step {step:,}" if isinstance(step, int) else name


def _by_class(folder: Path, facts: Mapping[str, Any], embedder: Embedder) -> tuple[list[View], int]:
    """Some classes of a set with some of their images each, and how many classes it has.

    Raises ValueError where its images cannot be read.
    """
    source = _NpzSet(folder / "samples.npz") if (folder / "samples.npz").exists() else _FolderSet(folder, facts)
    labels = source.labels
    present = sorted(set(labels)) if labels is not None else [-1]
    shown = {}
    for label in spread(present, MOST_CLASSES):
        indices = range(source.count) if labels is None else np.flatnonzero(np.array(labels) == label).tolist()
        shown[label] = list(indices[: 4 * IMAGES_OF_A_CLASS if labels is None else IMAGES_OF_A_CLASS])
    images = source.images({index for indices in shown.values() for index in indices})
    rows = []
    for label, indices in shown.items():
        caption = _caption(label, facts)
        cells = [
            {"picture": embedder.embed(images[i]), "alt": f"sample {i} of {caption or 'no class'}"} for i in indices
        ]
        rows.append({"label": label, "caption": caption or "samples", "cells": cells})
    return rows, len(present)


def _caption(label: int, facts: Mapping[str, Any]) -> str:
    if label < 0:
        return ""
    names = facts.get("classes")
    if isinstance(names, list) and label < len(names):
        return f"class {label}: {names[label]}"
    return f"class {label}"


class _NpzSet:
    """Samples in an npz as `sample` writes it: `arr_0` images, `arr_1` labels."""

    def __init__(self, path: Path):
        self._images = NpzImages(path)
        self.count = len(self._images)
        self.labels: list[int] | None = None
        if LABELS in npz_names(path):
            labels = read_npz(path, LABELS)
            if labels.ndim != 1 or not np.isfinite(labels).all():
                raise ValueError(f"{path.name}: arr_1 must be labels [N], it is {list(labels.shape)} or not all finite")
            self.labels = labels.astype(int).tolist()
            if len(self.labels) != self.count:
                raise ValueError(f"{path.name} has {self.count} images and {len(self.labels)} labels")

    def images(self, wanted: set[int]) -> dict[int, Image.Image]:
        """The images of these indices; what comes after the last of them is not read."""
        found, start, last = {}, 0, max(wanted)
        for batch in self._images.batches(64):
            for index in range(start, start + len(batch)):
                if index in wanted:
                    found[index] = Image.fromarray(batch[index - start].numpy())
            start += len(batch)
            if start > last:
                break
        return found


class _FolderSet:
    """Samples as image files named by their index in `images/`, or below a folder for each class; labels in
    `labels.npy`, or in their description."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        files = (path for path in (folder / "images").rglob("*") if path.suffix.lower() in FORMATS)
        self._files = sorted(files, key=lambda path: (path.stem, path))
        self.count = len(self._files)
        if not self._files:
            raise ValueError("holds no images: neither samples.npz nor images/")
        self.labels = self._labels(folder / "labels.npy", facts)

    def _labels(self, path: Path, facts: Mapping[str, Any]) -> list[int] | None:
        """None where nothing tells the labels of as many images as there are."""
        said, classes = facts.get("labels"), facts.get("classes")
        if path.is_file():
            said = read_npy(path).tolist()
        if said == _BY_INDEX and isinstance(classes, list) and classes:
            return [index % len(classes) for index in range(self.count)]
        known = isinstance(said, list) and len(said) == self.count and all(isinstance(each, int) for each in said)
        return said if known else None

    def images(self, wanted: set[int]) -> dict[int, Image.Image]:
        return {index: open_image(self._files[index]) for index in sorted(wanted)}
