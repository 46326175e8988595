"""Which files below a folder are images: told by their suffix, and where that says nothing by their first bytes."""

import os
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

# What systems and archivers leave in people's folders, besides names that begin with a dot.
LITTER = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db",
          "ehthumbs.db", "desktop.ini", "Icon\r"}  # fmt: skip

# The first bytes of what OpenCV or Pillow read.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
               b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")  # fmt: skip


def is_litter(name: str) -> bool:
    """Whether nobody meant a file or folder of this name as data."""
    return name.startswith(".") or name in LITTER


def folders(root: Path) -> list[Path]:
    """The folders right in `root`, sorted by name; without litter."""
    return [root / entry.name for entry in _entries(root) if entry.is_dir()]


def right_in(folder: Path) -> tuple[list[str], list[str]]:
    """(images, other files) right in a folder: their paths, sorted by name. A broken link with an image's suffix counts as an
    image, which cannot be read."""
    images, others = [], []
    for entry in _entries(folder):
        if not entry.is_dir():
            (images if _is_image(entry) else others).append(str(folder / entry.name))
    return images, others


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies right in a folder, sorted by name, without litter; nothing where it may not be read."""
    try:
        with os.scandir(folder) as entries:  # which, unlike a list of paths, knows kinds without asking for each
            return sorted((e for e in entries if not is_litter(e.name)), key=lambda e: e.name)
    except PermissionError:
        return []


def below(folder: Path, _above: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(images, other files) at any depth of a folder: those right in it, then those of its folders in the order of their names.

    Links to folders are followed, but not back to one that they lie in.
    """
    here = os.path.realpath(folder)
    if here in _above:
        return [], []
    images, others = right_in(folder)
    for inner in folders(folder):
        more, odd = below(inner, (*_above, here))
        images += more
        others += odd
    return images, others


def _is_image(entry: os.DirEntry) -> bool:
    # Neither sockets nor pipes, of which reading would wait, nor links to them.
    if not entry.is_file() and not (entry.is_symlink() and not os.path.exists(entry.path)):
        return False
    if os.path.splitext(entry.name)[1].lower() in SUFFIXES:
        return True
    try:
        with open(entry.path, "rb") as file:
            start = file.read(32)
    except OSError:
        return False
    if start.startswith(_BEGINNINGS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        return True
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis"):
        return True
    # "BM", the file's size, four bytes of zero; "P5", then white space and a number: two letters alone begin many a text.
    is_bmp = start[:2] == b"BM" and start[6:10] == b"\0\0\0\0"
    return is_bmp or (start[:1] == b"P" and start[1:2] in b"123456" and start[2:3].isspace() and start[3:4] in b"#0123456789")
