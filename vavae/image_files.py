"""Image files: listing those of a folder, and decoding them to 8-bit RGB."""

import os
import stat
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from common.files import FileError, open_regular, refuse_placeholders
from common.text import printable, shortened

FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
EXTENSIONS = frozenset(FORMATS)
# Files are recognised by content, and only as these: some of Pillow's other formats run programs.
_PILLOW_FORMATS = tuple(sorted(set(FORMATS.values())))
# Files that operating systems and archivers leave in folders, in lower case; hidden like names that begin with a dot.
_SYSTEM_FILES = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "lost+found",
        "thumbs.db",
        "desktop.ini",
        "system volume information",
    }
)
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_TIFF_SAMPLE_FORMAT, _UNSIGNED, _SIGNED = 339, 1, 2
_NO_RANGE = "whose black and white levels are not known; save it as unsigned 8 or 16 bits"
_FOLDER_LINK, _EMPTY = "link to a folder", "empty file"
_MAX_PATHS, _MAX_KINDS = 2, 8  # named in a message: paths of a kind, and kinds


class UnreadableImage(FileError):
    """An image file that cannot be decoded; the message names it."""


def open_image(path: str | Path) -> Image.Image:
    """A decoded image, RGB of 8 bits. Its content must be of one of `FORMATS`, whatever its name says.

    Grey of 9 to 16 bits is scaled so that white is 255, rounded to the nearest. Everything else is what Pillow's
    conversion gives: transparency is dropped, a palette looked up, colours of 16 bits lose their lower 8, of several
    images the first is taken, and a tag that says how the camera was held is not followed.

    Raises:
        UnreadableImage: a damaged or empty file, one of another kind, with more pixels than Pillow's limit (179
            million), of signed or 32-bit integers, or of floats; no file at all.
    """
    try:
        with open_regular(path) as file:
            begin = file.read(100)
            if not begin:
                raise FileError(f"{path} is empty")
            refuse_placeholders(path, begin)
            with Image.open(file, formats=_PILLOW_FORMATS) as image:
                return _rgb(image)
    except FileError as error:
        raise UnreadableImage(f"cannot read image: {error}") from None
    except UnidentifiedImageError:
        found = f"it begins with {begin[:12]!r}, so it is none of {', '.join(_PILLOW_FORMATS)}, or damaged"
        raise UnreadableImage(f"cannot read image {path}: {found}") from None
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
        raise UnreadableImage(f"cannot read image {path}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    # Pillow reads signed 8-bit samples as unsigned.
    if isinstance(image, TiffImageFile) and _SIGNED in image.tag_v2.get(_TIFF_SAMPLE_FORMAT, (_UNSIGNED,)):
        raise ValueError(f"its pixels are signed integers, {_NO_RANGE}")
    # Pillow decodes 16-bit PPM to 32-bit integers. (Its own conversion clips at 255 whatever the range.)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("I", "F"):
        numbers = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {numbers}, {_NO_RANGE}")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey [H, W] of more than 8 bits, scaled by its range."""
    white, inverted = 65535, False
    if isinstance(image, TiffImageFile):  # decoded values are as stored in the file
        white = 2 ** image.tag_v2[_TIFF_BITS][0] - 1
        inverted = image.tag_v2[_TIFF_PHOTOMETRIC] == _WHITE_IS_ZERO
    values = np.asarray(image).astype(np.uint32)
    if inverted:
        values = white - values
    return ((values * 255 + white // 2) // white).astype(np.uint8)


class ImageListing:
    """The content of a folder: its images, and everything else by kind.

    Names that begin with a dot or that systems leave behind are no images, and such folders are not listed. Links to
    files are followed wherever they lead, links to folders only where they are class folders.

    Attributes:
        left_out: kind → paths relative to the root, as far as `classes` and `images` came across them.
        linked: images found that are links.

    Raises ValueError where there is no such folder.
    """

    def __init__(self, root: str | Path):
        self.root, self.linked = Path(root), 0
        self.left_out: dict[str, list[str]] = defaultdict(list)
        if not self.root.is_dir():
            raise ValueError(f"data folder {root} {'is not a folder' if self.root.exists() else 'does not exist'}")

    def classes(self) -> tuple[str, ...]:
        """Names of the folders directly inside, sorted as text; what lies beside them is left out.

        Raises ValueError where a name is no text: it could not be kept with a checkpoint.
        """
        names = []
        for entry in self._entries(""):
            if _kind(entry) in ("folder", _FOLDER_LINK):
                if printable(entry.name) != entry.name:
                    raise ValueError(f"{self.root} has a class folder called {entry.name!r}: rename it (UTF-8 is read)")
                names.append(entry.name)
            else:
                self.left_out["beside the class folders"].append(entry.name)
        return tuple(sorted(names))

    def images(self, folder: str = "") -> list[str]:
        """Paths of the images at any depth below `folder`, in no order; both relative to the root."""
        found, folders = [], [folder]
        while folders:
            folder, empty = folders.pop(), True
            for entry in self._entries(folder):
                path, empty = os.path.join(folder, entry.name), False
                kind = _kind(entry)
                if kind == "image":
                    found.append(path)
                    self.linked += entry.is_symlink()
                elif kind == "folder":
                    folders.append(path)
                else:
                    self.left_out[kind].append(path)
            if empty:
                self.left_out["empty folder"].append(folder)
        return found

    def _entries(self, folder: str):
        """The entries of a folder that are not hidden."""
        with os.scandir(self.root / folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES:
                    self.left_out["hidden"].append(os.path.join(folder, entry.name))
                else:
                    yield entry

    def refuse_empty(self) -> None:
        """Raise UnreadableImage where image files without content were left out: a copy or download broke off."""
        if empty := self.left_out.get(_EMPTY):
            what = "1 image file is" if len(empty) == 1 else f"{len(empty):,} image files are"
            raise UnreadableImage(f"{what} empty below {self.root}: {shortened(sorted(empty), 5)}")

    def describe_left_out(self) -> str:
        """Such as `; left out: 3 × .gif (a/x.gif, a/y.gif, …), 1 × hidden (.git)`; empty where nothing is."""
        kinds = sorted(self.left_out.items(), key=lambda item: (-len(item[1]), item[0]))
        parts = [
            f"{len(paths):,} × {kind} ({shortened(sorted(paths), _MAX_PATHS)})" for kind, paths in kinds[:_MAX_KINDS]
        ]
        if others := sum(len(paths) for _, paths in kinds[_MAX_KINDS:]):
            parts.append(f"{others:,} of other kinds")
        return f"; left out: {', '.join(parts)}" if parts else ""


def _kind(entry: os.DirEntry) -> str:
    """`image`, `folder`, or why an entry of a folder is left out."""
    try:
        status = entry.stat()
    except OSError:
        return "link to nothing" if entry.is_symlink() else "not to be read"
    if stat.S_ISDIR(status.st_mode):
        return _FOLDER_LINK if entry.is_symlink() else "folder"
    extension = os.path.splitext(entry.name)[1].lower()
    if extension not in EXTENSIONS:
        return extension or "without an extension"
    if not stat.S_ISREG(status.st_mode):
        return "pipe, socket or device"
    return "image" if status.st_size else _EMPTY
