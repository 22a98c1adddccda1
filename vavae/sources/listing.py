"""What a folder holds: its images, its sub-folders, and what is neither, by kind."""

import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from common.text import printable
from vavae.image_files import FORMATS
from vavae.sources.source import EMPTY_FILE, describe_left_out, empty_images

EXTENSIONS = frozenset(FORMATS)
#: For messages about places without images.
OF_EXTENSIONS = f"(of {', '.join(sorted(EXTENSIONS))})"
# Files that operating systems and archivers leave in folders, in lower case; hidden like names that begin with a dot.
SYSTEM_FILES = frozenset(
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
_FOLDER_LINK = "link to a folder"


def is_hidden(name: str) -> bool:
    """Whether a name begins with a dot, or is one that systems and archivers leave behind."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def is_image_name(name: str) -> bool:
    """Whether a name ends as those of images do, in lower or upper case."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def folders_and_files(folder: Path) -> tuple[list[str], list[str]]:
    """Names of what lies directly in a folder, folders (and links to them) apart; hidden ones are left out."""
    names: tuple[list[str], list[str]] = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_hidden(entry.name):
                names[not entry.is_dir()].append(entry.name)
    return names


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

    @property
    def empty(self) -> list[str]:
        """Paths of the image files without content, which are left out."""
        return self.left_out.get(EMPTY_FILE, [])

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

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """The entries of a folder that are not hidden."""
        with os.scandir(self.root / folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    self.left_out["hidden"].append(os.path.join(folder, entry.name))
                else:
                    yield entry

    def refuse_empty(self) -> None:
        """Raise UnreadableImage where image files without content were left out."""
        if self.empty:
            raise empty_images(f"below {self.root}", sorted(self.empty), what="image file")

    def describe_left_out(self) -> str:
        """Such as `; left out: 3 × .gif (a/x.gif, a/y.gif, …), 1 × hidden (.git)`; empty where nothing is."""
        return describe_left_out({kind: (len(paths), sorted(paths)) for kind, paths in self.left_out.items()})


def _kind(entry: os.DirEntry[str]) -> str:
    """`image`, `folder`, or why an entry of a folder is left out."""
    try:
        status = entry.stat()
    except OSError:
        return "link to nothing" if entry.is_symlink() else "not to be read"
    if stat.S_ISDIR(status.st_mode):
        return _FOLDER_LINK if entry.is_symlink() else "folder"
    if not is_image_name(entry.name):
        return os.path.splitext(entry.name)[1].lower() or "without an extension"
    if not stat.S_ISREG(status.st_mode):
        return "pipe, socket or device"
    return "image" if status.st_size else EMPTY_FILE
