"""ImageNet as it is distributed: which folder is taken, and labels of validation images by every file that has them."""

import logging

import numpy as np
import pytest
from scipy.io import savemat

from common.files import FileError
from vavae.image_files import UnreadableImage
from vavae.sources import open_source
from vavae.sources.imagenet_labels import GROUND_TRUTH, SOLUTION, SYNSETS

DEVKIT = "ILSVRC2012_devkit_t12/data"
#: In the order of the development kit, which is not the sorted one: the first three of the real one, and a fourth.
SYNSET_IDS = ("n02119789", "n02100735", "n02110185", "n01440764")
SORTED = ("n01440764", "n02100735", "n02110185", "n02119789")
#: Of six validation images, by their sorted names: numbers of the kit, and synset ids and labels worked out by hand.
NUMBERS = (4, 1, 2, 2, 3, 1)
OF_IMAGES = ("n01440764", "n02119789", "n02100735", "n02100735", "n02110185", "n02119789")
LABELS = [0, 3, 1, 1, 2, 3]
IMAGES = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)]


def write(path, content="image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def train(folder, synsets=SORTED):
    for synset in synsets:
        write(folder / synset / f"{synset}_1.JPEG", synset)


def flat(folder):
    for name in reversed(IMAGES):
        write(folder / name, name)
    return folder


def meta(path, ids=SYNSET_IDS):
    """As in the kit: a structure for each synset, inner nodes of the hierarchy behind the classes."""
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = [(i, synset, "a, b", "an animal", 0, 0, 0) for i, synset in enumerate(ids, start=1)]
    rows += [(len(rows) + 1, "n00001740", "entity", "all", 2, [1, 2], 1)]
    synsets = np.zeros((len(rows), 1), dtype=[(name, object) for name in names])
    synsets[:, 0] = rows
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"synsets": synsets})


def class_map(ids=SYNSET_IDS) -> str:
    return "".join(f"{synset} {i} some_name\n" for i, synset in enumerate(ids, start=1))


def by_lines(values) -> str:
    return "".join(f"{value}\n" for value in values)


def solution(ids=OF_IMAGES, images=IMAGES) -> str:
    """Kaggle's, whose rows are in no order."""
    rows = [f"{image[:-5]},{synset} 85 1 499 272 {synset} 1 2 3 4 " for image, synset in zip(images, ids, strict=True)]
    return by_lines(["ImageId,PredictionString", *rows[::-1]])


def said(caplog, path, **options):
    """A source, and its one line in the log."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "vavae"):
        source = open_source(path, **options)
    (record,) = caplog.records
    return source, record.getMessage()


def contents(source) -> list[str]:
    return [source.read(index).decode() for index in range(len(source))]


# Which folder is taken


@pytest.mark.parametrize("base", ["", "Data/CLS-LOC/", "ILSVRC/Data/CLS-LOC/"])
def test_the_folder_of_a_split_is_taken_and_said(tmp_path, caplog, base):
    train(tmp_path / base / "train")
    train(tmp_path / base / "val", SORTED[2:])
    write(tmp_path / base / "test/1.JPEG")
    source, line = said(caplog, tmp_path)
    assert source.classes == SORTED and contents(source) == list(SORTED) and source.labels.tolist() == [0, 1, 2, 3]
    assert source.entry(0) == "n01440764/n01440764_1.JPEG 9" and source.description == str(tmp_path)
    assert (
        line == f"{tmp_path}: 4 images in 4 classes (n01440764, n02100735, n02110185, …), from its folder {base}train"
    )
    # Labels of the validation folder are those of the training folder, also where it has fewer classes.
    source, line = said(caplog, tmp_path, split="val", num_classes=4)
    assert source.classes == SORTED and contents(source) == list(SORTED[2:]) and source.labels.tolist() == [2, 3]
    assert f"from its folder {base}val; without images: 2 of the classes (n01440764, n02100735)" in line
    file = write(tmp_path / "classes.txt", by_lines(SORTED[::-1]))
    assert open_source(tmp_path, split="val", class_file=file).labels.tolist() == [1, 0]
    # The folder itself is one like others, whatever the split.
    assert len(open_source(tmp_path / base / "train", split="val")) == 4
    assert open_source(tmp_path / base / "val").classes == SORTED[2:]
    assert contents(open_source(tmp_path, split="val", labelled=False)) == list(SORTED[2:])


def test_classes_that_training_does_not_have_are_refused(tmp_path):
    train(tmp_path / "train")
    with pytest.raises(ValueError, match=r"has train, but no val beside it$"):
        open_source(tmp_path, split="val")
    train(tmp_path / "val", ["n02100736"])
    with pytest.raises(
        ValueError, match=r"'n02100736' is not in the class folders of .*/train \(did you mean 'n0210073"
    ):
        open_source(tmp_path, split="val")


def test_a_folder_with_other_classes_is_none_of_imagenet(tmp_path, caplog):
    train(tmp_path / "train", [*SORTED, "cat"])
    assert "is data.data_path one level too high?" in said(caplog, tmp_path)[1]


# Validation images without class folders


def with_meta(folder):
    write(folder / GROUND_TRUTH, by_lines(NUMBERS))
    meta(folder / "meta.mat")


def with_map(folder):
    write(folder / GROUND_TRUTH, by_lines(NUMBERS))
    write(folder / "map_clsloc.txt", class_map())


FILES = {
    "meta.mat": (with_meta, GROUND_TRUTH),
    "map_clsloc.txt": (with_map, GROUND_TRUTH),
    "synset ids": (lambda folder: write(folder / SYNSETS, by_lines(OF_IMAGES)), SYNSETS),
    "Kaggle": (lambda folder: write(folder / SOLUTION, solution()), SOLUTION),
}


@pytest.mark.parametrize("place", ["val", ".", DEVKIT, f"../{DEVKIT}"])
@pytest.mark.parametrize("kind", FILES)
def test_labels_are_found_beside_the_images(tmp_path, caplog, kind, place):
    root = tmp_path / "imagenet"
    folder = flat(root / "val")
    make, name = FILES[kind]
    make(root / place)
    source, line = said(caplog, folder, num_classes=4)
    assert contents(source) == IMAGES and source.labels.tolist() == LABELS and source.classes == SORTED
    assert source.entry(5) == f"{IMAGES[5]} 28"
    assert line.startswith(f"{folder}: 6 images in 4 classes (n01440764, n02100735, n02110185, …), labels from ")
    assert name in line and (kind in line if name == GROUND_TRUTH else True)
    train(root / "train")
    source, line = said(caplog, root, split="val")
    assert source.labels.tolist() == LABELS and "from its folder val, labels from" in line
    assert contents(open_source(folder, labelled=False)) == IMAGES
    file = write(root / "classes.txt", by_lines(SORTED[::-1]))
    reversed_labels = open_source(root, split="val", class_file=file).labels.tolist()
    assert reversed_labels == [3 - label for label in LABELS]


def test_labels_are_found_as_kaggle_has_them(tmp_path):
    train(tmp_path / "ILSVRC/Data/CLS-LOC/train")
    flat(tmp_path / "ILSVRC/Data/CLS-LOC/val")
    write(tmp_path / SOLUTION, solution())
    for root in (tmp_path, tmp_path / "ILSVRC"):
        assert open_source(root, split="val").labels.tolist() == LABELS


@pytest.mark.parametrize("kind", FILES)
def test_a_labels_file_may_be_named_and_a_class_file_orders_its_classes(tmp_path, kind):
    folder = tmp_path / "images"
    for i, name in enumerate(IMAGES):  # of any name where the file is given; sorted as before
        write(folder / (f"{i}.png" if kind != "Kaggle" else name), name)
    make, name = FILES[kind]
    make(tmp_path / "elsewhere")
    file = write(tmp_path / "classes.txt", by_lines(SORTED[::-1]))
    source = open_source(folder, labels_file=tmp_path / "elsewhere" / name, class_file=file)
    assert contents(source) == IMAGES
    assert source.classes == SORTED[::-1] and source.labels.tolist() == [3 - label for label in LABELS]


def test_a_labels_file_is_for_the_validation_split_alone(tmp_path):
    train(tmp_path / "train")
    flat(tmp_path / "val")
    file = write(tmp_path / "elsewhere.txt", by_lines(OF_IMAGES))
    assert contents(open_source(tmp_path, labels_file=file)) == list(SORTED)
    assert open_source(tmp_path, split="val", labels_file=file).labels.tolist() == LABELS
    with pytest.raises(ValueError, match=r"data\.labels_file is .*elsewhere\.txt, but .*/train has its own labels"):
        open_source(tmp_path / "train", labels_file=file)
    train(tmp_path / "other/train")
    train(tmp_path / "other/val")  # where the file would go unread
    with pytest.raises(ValueError, match=r"data\.labels_file is .*elsewhere\.txt, but .*/other has its own labels"):
        open_source(tmp_path / "other", split="val", labels_file=file)


def test_an_empty_image_keeps_its_line(tmp_path, caplog):
    folder = flat(tmp_path / "val")
    with_meta(tmp_path)
    write(folder / IMAGES[1], b"")
    with pytest.raises(UnreadableImage, match=rf"1 image file is empty below .*: {IMAGES[1]}"):
        open_source(folder)
    source, line = said(caplog, folder, on_unreadable="skip")
    assert (
        source.empty == 1 and source.labels.tolist() == [0, 1, 1, 2, 3] and contents(source) == [IMAGES[0], *IMAGES[2:]]
    )
    assert f"left out: 1 × empty file ({IMAGES[1]})" in line


def test_classes_without_images_keep_their_labels(tmp_path):
    folder = flat(tmp_path / "val")
    write(tmp_path / GROUND_TRUTH, by_lines([1] * 6))
    meta(tmp_path / "meta.mat")
    source = open_source(folder)
    assert source.classes == SORTED and source.labels.tolist() == [3] * 6


def ground_truth(text):
    return lambda root: (with_meta(root), write(root / GROUND_TRUTH, text))


def mapped(text):
    return lambda root: (with_map(root), write(root / "map_clsloc.txt", text))


WRONG = {
    "no file": (lambda root: None, rf"has no class folders, and there is no .*{GROUND_TRUTH}.*data\.labels_file"),
    "no mapping": (
        lambda root: write(root / GROUND_TRUTH, by_lines(NUMBERS)),
        rf"{GROUND_TRUTH} numbers classes in an order of its own, and neither meta\.mat nor map_clsloc\.txt",
    ),
    "too few": (ground_truth(by_lines(NUMBERS[:5])), r"has 5 lines, .*/val 6 images"),
    "too many": (ground_truth(by_lines([*NUMBERS, 1])), r"has 7 lines, .*/val 6 images"),
    "number of an inner node": (ground_truth(by_lines([*NUMBERS[:5], 5])), r"line 6: '5' .*meta\.mat has 1 to 4"),
    "number from 0": (ground_truth(by_lines([0, *NUMBERS[1:]])), r"line 1: '0' is no number of a class"),
    "no number": (ground_truth(by_lines([1, "x", *NUMBERS[2:]])), r"line 2: 'x' is no number"),
    "blank line": (ground_truth("1\n\n2\n2\n3\n1\n"), r"line 2: '' is no number"),
    "empty": (ground_truth("\n"), r"ground_truth\.txt is empty"),
    "no kind": (ground_truth("kit fox\n"), r"line 1: 'kit fox' is no number from 1, no synset id"),
    "damaged meta.mat": (
        lambda root: (with_meta(root), write(root / "meta.mat", b"MATLAB 5.0" + bytes(200))),
        r"meta\.mat is damaged, or not of the development kit",
    ),
    "meta.mat twice": (
        lambda root: (with_meta(root), meta(root / "meta.mat", [SYNSET_IDS[0]] * 4)), r"meta\.mat is damaged: wanted",
    ),
    "map without number": (mapped("n02119789\n"), r"map_clsloc\.txt, line 1: 'n02119789' is no synset id, number"),
    "map of the same number": (mapped("n02119789 1 a\nn02100735 1 b\n"), r"map_clsloc\.txt is damaged: wanted is"),
    "map of no synset": (mapped("x 1 a\n"), r"map_clsloc\.txt is damaged: 'x' is no synset id"),
    "no synset id": (
        lambda root: write(root / SYNSETS, by_lines([*OF_IMAGES[:5], "n123"])), r"line 6: 'n123' is no synset id",
    ),
    "not enough ids": (lambda root: write(root / SYNSETS, by_lines(OF_IMAGES[:5])), r"has 5 lines, .*/val 6 images"),
    "image not listed": (
        lambda root: write(root / SOLUTION, solution(OF_IMAGES[:5], IMAGES[:5])),
        rf"has no line for 1 of 6 images of .*/val: {IMAGES[5]}",
    ),
    "image not there": (
        lambda root: write(root / SOLUTION, solution([*OF_IMAGES, "n01440764"], [*IMAGES, "other.JPEG"])),
        r"line 2: there is no image other in .*/val, nor any for 1 of 7 lines",
    ),
    "image twice": (
        lambda root: write(root / SOLUTION, solution([*OF_IMAGES, "n01440764"], [*IMAGES, IMAGES[5]])),
        r"line 3: image 'ILSVRC2012_val_00000006' has a label on line 2 already",
    ),
    "two classes in an image": (
        lambda root: write(root / SOLUTION, solution().replace("n02100735 1 2 3 4", "n01440764 1 2 3 4", 1)),
        r"line 4: .* is not an image, a comma and boxes of one synset id",
    ),
    "no class": (lambda root: write(root / SOLUTION, solution() + "x,\n"), r"line 8: 'x,' is not an image, a comma"),
    "not UTF-8": (lambda root: write(root / SYNSETS, b"n01440764\n\xff\n"), r"line 2: is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_labels_that_are_not_right_are_named_and_never_guessed(tmp_path, name):
    folder = flat(tmp_path / "imagenet/val")
    make, message = WRONG[name]
    make(tmp_path / "imagenet")
    with pytest.raises(FileError, match=message) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


def test_labels_of_classes_that_are_not_wanted_are_named_with_their_line(tmp_path):
    train(tmp_path / "train", SORTED[:3])
    flat(tmp_path / "val")
    write(tmp_path / SYNSETS, by_lines(OF_IMAGES))
    with pytest.raises(
        ValueError, match=rf"{SYNSETS}, line 2: class 'n02119789' is not in the class folders of .*/train"
    ):
        open_source(tmp_path, split="val")
    with pytest.raises(ValueError, match=r"data\.num_classes is 1000, but .*/val has 4 classes: n01440764, "):
        open_source(tmp_path / "val", num_classes=1000)
    file = write(tmp_path / "classes.txt", by_lines(SORTED[1:]))
    with pytest.raises(ValueError, match=rf"{SYNSETS}, line 1: class 'n01440764' is not in data\.class_file"):
        open_source(tmp_path / "val", class_file=file)
    with pytest.raises(FileError, match=r"labels\.txt does not exist"):
        open_source(tmp_path / "val", labels_file=tmp_path / "labels.txt")


@pytest.mark.parametrize("beside", [["val"], ["val", "test"]])
def test_a_folder_of_splits_is_none_of_classes_whatever_they_are_called(tmp_path, beside):
    for name in ("cats", "dogs", "n00000001"):
        write(tmp_path / f"train/{name}/1.png")
    for split in beside:
        write(tmp_path / f"{split}/dogs/1.png")
    assert open_source(tmp_path).classes == ("cats", "dogs", "n00000001")
    validation = open_source(tmp_path, split="val")
    assert validation.name(0).endswith("val/dogs/1.png") and validation.labels.tolist() == [1]
    assert len(open_source(tmp_path, labelled=False)) == 3 + len(beside)  # all of it


def test_other_folders_beside_the_splits_are_classes(tmp_path):
    for name in ("train/a", "val/a", "bus"):
        write(tmp_path / name / "1.png")
    assert open_source(tmp_path).classes == ("bus", "train", "val")
