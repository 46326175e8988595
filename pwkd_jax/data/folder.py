"""A folder of image files: data_dir/SPLIT/CLASS/any-name.jpg, as most image data sets are handed around."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from pwkd_jax.data.images import Unreadable, decode
from pwkd_jax.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Files:
    """Image files and their labels. What a file holds is told by its content, not by its suffix."""

    def __init__(self, paths: Sequence[str], labels: np.ndarray):
        self._paths, self._labels = list(paths), np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """What a message calls it."""
        return f"file {self._paths[index]}"

    def missing(self) -> list[Path]:
        return []

    def read(self, indices: Sequence[int]) -> list[tuple[bytes | Unreadable, int]]:
        """[(encoded image, label)] of `indices`; an Unreadable stands for a file that cannot be read."""
        return [(self._bytes(int(i)), int(self._labels[i])) for i in indices]

    def _bytes(self, index: int) -> bytes | Unreadable:
        try:
            with open(self._paths[index], "rb") as file:
                return file.read()
        except OSError as e:
            return Unreadable(e.strerror or type(e).__name__)

    def labels(self) -> np.ndarray:
        """int32 [N]."""
        return self._labels


def scan(data_dir: str) -> tuple[dict[str, Files], list[str]]:
    """({split: its files}, names of the classes): the sub-folders of `data_dir`, and those of every one of them, sorted.

    Images are the files right in a class's folder with a suffix of SUFFIXES, in the order of their names. Symbolic links
    are followed (a broken one counts as an image that cannot be read); names that begin with a dot, other suffixes and
    deeper folders are left out. Raises UserError where a folder is absent or empty, or the splits' classes differ.
    """
    root = Path(data_dir).expanduser()
    if not data_dir or not root.is_dir():
        raise UserError(
            f"data.data_dir: '{data_dir}' is not a folder; with data.name=folder give the one that holds SPLIT/CLASS/IMAGE, "
            "as in train/cat/1.jpg"
        )
    splits = {split.name: {c.name: c for c in _folders(split)} for split in _folders(root)}
    # A sub-folder without classes is no split: people keep lists and notes beside their images.
    splits = {name: classes for name, classes in splits.items() if classes}
    if not splits:
        raise UserError(f"data.data_dir: {root} holds no SPLIT/CLASS folders of images, such as train/cat")
    first, *others = splits
    for other in others:
        if odd := sorted(splits[first].keys() ^ splits[other].keys()):
            where, lacks = (first, other) if odd[0] in splits[first] else (other, first)
            raise UserError(
                f"data.data_dir: class '{odd[0]}' is in {root / where} but not in {root / lacks}; all splits need "
                "the same classes"
            )
    classes = sorted(splits[first])
    found = {}
    for split, folders in splits.items():
        paths, labels = [], []
        for label, name in enumerate(classes):
            here = sorted(p.name for p in folders[name].iterdir() if _is_image(p))
            if not here:
                raise UserError(f"data.data_dir: {folders[name]} holds no images; their suffixes are {', '.join(SUFFIXES)}")
            paths += [str(folders[name] / p) for p in here]
            labels += [label] * len(here)
        found[split] = Files(paths, np.array(labels, np.int32))
    return found, classes


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_image(path: Path) -> bool:
    named = path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    return named and (path.is_file() or path.is_symlink()) and not path.is_dir()


def part(found: dict[str, Files], ranges: Sequence[tuple[str, int, int]]) -> Files:
    """The files of (split, first, one past the last) ranges, laid end to end."""
    paths = [p for split, start, stop in ranges for p in found[split]._paths[start:stop]]
    return Files(paths, np.concatenate([found[split].labels()[start:stop] for split, start, stop in ranges]))


def many_sizes(found: dict[str, Files]) -> bool:
    """Whether the headers of the files, as far as they are images, give more than one size."""
    sizes = set()
    for path in (path for files in found.values() for path in files._paths):
        with contextlib.suppress(OSError), PIL.Image.open(path) as image:
            sizes.add(image.size)
        if len(sizes) > 1:
            return True
    return False


def decode_all(files: Files) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, H, W, 3], int32 [N]). Raises UserError where a file is no image or not of the first one's size."""
    images = None
    for index in range(len(files)):
        [(encoded, _)] = files.read([index])
        try:
            if isinstance(encoded, Unreadable):
                raise encoded
            image = decode(encoded)
        except Unreadable as e:
            raise UserError(f"data.data_dir: {files.name(index)} cannot be decoded ({e}); remove or replace it") from e
        if images is None:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            sizes = ["x".join(map(str, shape)) for shape in (image.shape, images.shape[1:])]
            raise UserError(
                f"data.image_size: {files.name(index)} is {sizes[0]} and others are {sizes[1]}; images of many sizes are "
                "streamed, at a data.image_size above 0"
            )
        images[index] = image
    return images, files.labels()
