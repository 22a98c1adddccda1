"""Labels of samples: the protocols of `sample.labels`, and labels that are given."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.files import FileError, open_regular
from common.sections import expand_home, short
from common.seeds import mix
from launch.config import ConfigError
from launch.evaluation.npz_file import read_npy
from lightningdit.config import LabelProtocol

#: The last word of the seeds of labels, by protocol: others than those of noise, which has three words.
_BALANCED, _SHUFFLED, _RANDOM = 1, 2, 3
_LISTED = 1000  # labels that are written out one by one
_FILE_LIMIT = 2**31  # bytes


def protocol_labels(protocol: LabelProtocol, count: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels [count] int64 of samples 0 to count.

    Of all protocols but "shuffled", label i is a function of (seed, i) and the number of classes alone.
    """
    i = np.arange(count)
    if protocol == "random":
        return (mix(seed, i, 0, _RANDOM) % np.uint64(num_classes)).astype(np.int64)
    if protocol == "balanced":
        return _balanced(count, num_classes, seed)
    labels = i % num_classes
    if protocol == "shuffled":  # sorting hashes draws a permutation; equal ones stay in their order
        labels = labels[np.argsort(mix(seed, i, 0, _SHUFFLED), kind="stable")]
    return labels.astype(np.int64)


def _balanced(count: int, num_classes: int, seed: int) -> np.ndarray:
    """Permutations of all classes, one after the other, each by the hashes of (seed, index of the run, class)."""
    runs = -(-count // num_classes)
    permutations = (np.argsort(mix(seed, run, np.arange(num_classes), _BALANCED), kind="stable") for run in range(runs))
    return np.concatenate(list(permutations)).astype(np.int64)[:count]


def given_labels(text: str) -> list[int]:
    """The labels that `--labels` names: "1,2,3", or "@FILE" of whole numbers, a text or an .npy of one axis.

    Raises ConfigError for anything else.
    """
    if text.startswith("@"):
        return _read(Path(expand_home(text[1:])))
    return _numbers(text.split(","), f"--labels {short(text)}")


def _read(path: Path) -> list[int]:
    if path.suffix != ".npy":
        with open_regular(path) as file:
            content = file.read(_FILE_LIMIT)
        try:
            return _numbers(content.decode().replace(",", " ").split(), str(path))
        except UnicodeDecodeError:
            raise FileError(f"{path} is no text; labels are whole numbers, in a text or an .npy") from None
    labels = read_npy(path)
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        kind = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else "an npz"
        raise FileError(f"{path} holds {kind}; labels are whole numbers [N]")
    return labels.tolist()


def _numbers(words: Iterable[str], source: str) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ConfigError(f"{source}: give whole numbers separated by commas, such as 1,2,3") from None


def check_labels(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """The labels [N] int64; raises ConfigError, naming some, where there are none or some are no class."""
    found = np.asarray(labels, dtype=object) if isinstance(labels, Sequence) else labels  # any whole number fits
    wrong = found[(found < 0) | (found >= num_classes)]
    if len(wrong) or not len(found):
        shown = short(wrong[:8].tolist()) + (f" and {len(wrong) - 8:,} more" if len(wrong) > 8 else "")
        raise ConfigError(
            f"labels {shown if len(wrong) else 'none'}: classes are 0 to {num_classes - 1} (data.num_classes)"
        )
    return found.astype(np.int64)


def describe_labels(labels: np.ndarray, given: bool, protocol: LabelProtocol, num_classes: int) -> dict:
    """The facts of labels: `labels`, in words or one by one, and `label_counts`, the images of each class."""
    words = {
        "index": "index modulo number of classes",
        "balanced": "balanced: each class once in every run of as many images as there are classes, by the seed",
        "shuffled": "shuffled: index modulo number of classes, in an order by the seed",
        "random": "random: uniform by (seed, index)",
    }
    stated: str | list[int] = words[protocol]
    if given and not np.array_equal(labels, protocol_labels("index", len(labels), num_classes, 0)):
        stated = labels.tolist() if len(labels) <= _LISTED else f"given: SHA-256 {_sha256(labels)}"
    elif given:
        stated = words["index"]
    return {"labels": stated, "label_counts": np.bincount(labels, minlength=num_classes).tolist()}


def _sha256(labels: np.ndarray) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
