"""A folder of image files: data_dir/SPLIT/CLASS/any-name.jpg, as most image data sets are handed around."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from pwkd_jax.data import annotations, image_files
from pwkd_jax.data.depth import Unscaled
from pwkd_jax.data.image_files import SUFFIXES
from pwkd_jax.data.images import Unreadable, decode
from pwkd_jax.data.slices import OFFER
from pwkd_jax.errors import UserError

NO_IMAGES = "that are no images are left out"


class Files:
    """Image files and their labels. What a file holds is told by its content, not by its suffix.

    notes: what was left out of them, or taken from where one might not look; clauses for a message.
    """

    def __init__(self, paths: Sequence[str], labels: np.ndarray, notes: Sequence[str] = ()):
        self.notes = list(notes)
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
            with open(self._paths[index], "rb", buffering=0) as file:
                return file.read()
        except OSError as e:
            return Unreadable(e.strerror or type(e).__name__)

    def labels(self) -> np.ndarray:
        """int32 [N]."""
        return self._labels


def scan(data_dir: str, asked: Sequence[str] | None = None) -> tuple[dict[str, Files], list[str]]:
    """({split: its files}, names of the classes, sorted): of the splits `asked` for, where they are there, or of all.

    A class's images are all below its folder, those right in it first, in the order of their names: files with a suffix of
    SUFFIXES, and others that begin as images do. Symbolic links are followed (a broken one counts as an image that cannot be
    read); litter of systems is left out, and folders of `data_dir` that nobody asked for are not read. A split whose images
    lie flat has their classes in a file, see `annotations`. Raises UserError where a folder is absent or empty, or the splits'
    classes differ.
    """
    root = _root(data_dir)
    splits = _splits(root)
    wanted = [name for name in dict.fromkeys(asked) if name in splits] if asked is not None else list(splits)
    flat = {name: annotations.flat_images(root / name) for name in wanted if _is_flat(root / name)}
    classed = {name: {c.name: c for c in image_files.folders(root / name)} for name in wanted if name not in flat}
    _refuse_other_classes(root, classed)
    classes = sorted(next(iter(classed.values()), ())) or _classes_beside(root, flat)
    found = {}
    for name in wanted:
        found[name] = _flat(root / name, flat[name], classes) if name in flat else _classed(root / name, classed[name], classes)
    return found, classes


def split_names(data_dir: str) -> list[str]:
    """The folders of `data_dir` that may be splits: those with folders or images in them, sorted."""
    return list(_splits(_root(data_dir)))


def _root(data_dir: str) -> Path:
    root = Path(data_dir).expanduser()
    if not data_dir or not root.is_dir():
        raise UserError(
            f"data.data_dir: '{data_dir}' is not a folder; with data.name=folder give the one that holds SPLIT/CLASS/IMAGE, "
            "as in train/cat/1.jpg"
        )
    return root


def _splits(root: Path) -> dict[str, None]:
    inside = image_files.folders(root)
    # A sub-folder without classes is no split: people keep lists and notes beside their images. One of images is a split that
    # lies flat where a class is expected elsewhere, and otherwise a class.
    deep = [p.name for p in inside if image_files.folders(p)]
    if not deep:
        hint = "as in train/cat"
        if any(image_files.right_in(p)[0] for p in inside):
            hint = f"as in train/{inside[0].name}; move the classes into {root / 'train'}, and {OFFER}"
        raise UserError(f"data.data_dir: {root} holds no SPLIT/CLASS folders of images, {hint}")
    return dict.fromkeys(p.name for p in inside if p.name in deep or image_files.right_in(p)[0])


def _is_flat(split: Path) -> bool:
    inside = [p.name for p in image_files.folders(split)]
    return not inside or (inside == ["images"] and annotations.find(split) is not None)


def _refuse_other_classes(root: Path, classed: dict[str, dict[str, Path]]) -> None:
    first, *others = classed or ("",)
    for other in others:
        if not classed[first].keys() & classed[other].keys():
            raise UserError(
                f"data.data_dir: {root / other} holds none of the classes of {root / first} but {_listed(classed[other])}; "
                f"images whose class is not known are no split, so {OFFER}"
            )
        if odd := sorted(classed[first].keys() ^ classed[other].keys()):
            where, lacks = (first, other) if odd[0] in classed[first] else (other, first)
            raise UserError(
                f"data.data_dir: class '{odd[0]}' is in {root / where} but not in {root / lacks}; all splits need "
                "the same classes, so move that folder away, or add it to the other"
            )


def _classes_beside(root: Path, flat: dict[str, list[str]]) -> list[str]:
    """The classes of splits that all lie flat: the folders of the split `train`, or what their files name."""
    if "train" in _splits(root) and not _is_flat(root / "train"):
        return sorted(p.name for p in image_files.folders(root / "train"))
    files = {file: flat[name] for name in flat if (file := annotations.find(root / name))}
    return sorted({name for file, images in files.items() for name in annotations.classes_named(file, images)})


def _flat(split: Path, images: list[str], classes: list[str]) -> Files:
    labels = annotations.labels(split, images, classes)
    others = [path for path in image_files.right_in(split)[1] if Path(path) != annotations.find(split)]
    return Files(images, np.array(labels, np.int32), _counted((others, NO_IMAGES)))


def _classed(split: Path, folders: dict[str, Path], classes: list[str]) -> Files:
    paths, labels, deeper, others = [], [], [], []
    for label, name in enumerate(classes):
        here, odd = image_files.below(folders[name])
        if not here:
            raise UserError(f"data.data_dir: {folders[name]} holds no images; their suffixes are {', '.join(SUFFIXES)}")
        inner = [path for path in here if Path(path).parent != folders[name]]
        deeper += inner if len(inner) < len(here) else []
        others += odd
        paths += here
        labels += [label] * len(here)
    loose, odd = image_files.right_in(split)
    notes = _counted(
        (deeper, "lie in deeper folders of their class and are read with it"),
        (loose, f"right in {split}, in no class's folder, are left out"),
        (others + odd, NO_IMAGES),
    )
    return Files(paths, np.array(labels, np.int32), notes)


def _counted(*kinds: tuple[list[str], str]) -> list[str]:
    return [f"{len(files)} files {what}, the first {files[0]}" for files, what in kinds if files]


def _listed(names: Iterable[str]) -> str:
    """The first few of `names` in quotes."""
    names = sorted(names)
    return ", ".join(f"'{n}'" for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def part(found: dict[str, Files], ranges: Sequence[tuple[str, int, int]]) -> Files:
    """The files of (split, first, one past the last) ranges, laid end to end."""
    paths = [p for split, start, stop in ranges for p in found[split]._paths[start:stop]]
    return Files(paths, np.concatenate([found[split].labels()[start:stop] for split, start, stop in ranges]))


def many_sizes(found: dict[str, Files]) -> bool:
    """Whether the headers of the files, as far as they are images, give more than one size."""
    sizes = set()
    for path in (path for files in found.values() for path in files._paths):
        with contextlib.suppress(Exception), PIL.Image.open(path) as image:  # Pillow's readers raise of everything
            sizes.add(image.size)
        if len(sizes) > 1:
            return True
    return False


def decode_all(files: Files, pixel_range: tuple[float, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, H, W, 3], int32 [N]). pixel_range: see `images.decode`.

    Raises UserError where a file is no image or not of the first one's size.
    """
    images = None
    for index in range(len(files)):
        [(encoded, _)] = files.read([index])
        try:
            if isinstance(encoded, Unreadable):
                raise encoded
            image = decode(encoded, 1, pixel_range)
        except Unscaled as e:
            raise UserError(f"data.pixel_range: {files.name(index)} is no image of bytes, and {e}") from e
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
