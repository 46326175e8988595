"""Images that lie flat, their classes in a file beside them: ImageNet's validation images and Tiny ImageNet as they unpack."""

import re
from collections.abc import Sequence
from pathlib import Path

from pwkd_jax.data import image_files
from pwkd_jax.data.slices import OFFER
from pwkd_jax.errors import UserError

# What such files are called, with the split's name for {}: Tiny ImageNet's, Kaggle's, those of ILSVRC2012 and of Caffe.
_NAMES = ("{}_annotations.txt", "{}_labels.txt", "{}_labels.csv", "{}.txt", "{}.csv", "LOC_{}_solution.csv", "annotations.txt",
          "annotations.csv", "labels.txt", "labels.csv", "ground_truth.txt", "{}_ground_truth.txt",
          "ILSVRC2012_validation_ground_truth.txt", "imagenet_2012_validation_synset_labels.txt")  # fmt: skip
_FORMS = "lines of an image's name and its class, or one class for each image in the order of their names"


def find(split: Path) -> Path | None:
    """The file of classes of a folder of images: of a known name in it or beside it, else the only text in it; or None."""
    places = (split, split.parent, split.parent / "ILSVRC2012_devkit_t12" / "data")
    names = [name.format(split.name) for name in _NAMES]
    if known := next((place / name for place in places for name in names if (place / name).is_file()), None):
        return known
    texts = [path for path in image_files.right_in(split)[1] if path.lower().endswith((".txt", ".csv", ".tsv"))]
    return Path(texts[0]) if len(texts) == 1 else None


def flat_images(split: Path) -> list[str]:
    """The images right in a split's folder, or in the folder `images` in it; their paths, sorted by name."""
    images = image_files.right_in(split)[0]
    return images or (image_files.below(split / "images")[0] if (split / "images").is_dir() else [])


def labels(split: Path, images: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The label of each of a flat split's images, from its file of classes; where there is none, those of ILSVRC2012's 50,000
    validation images from the list that TFDS brings. Raises UserError."""
    if file := find(split):
        return read(file, images, classes)
    numbers = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", Path(path).stem) for path in images]
    if len(classes) == 1000 and all(numbers):
        import tensorflow_datasets as tfds

        known = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
        given = {path: known[int(number[1]) - 1] for path, number in zip(images, numbers, strict=True)}
        return _numbers(split, given, images, classes)
    raise UserError(
        f"data.data_dir: {split} holds {len(images)} images in no class's folder, and no file says their classes; put "
        f"{split.name}_annotations.txt there, with {_FORMS}, or {OFFER}"
    )


def classes_named(file: Path) -> list[str]:
    """The classes that a file of classes names, sorted."""
    return sorted(set(_last_column(_rows(file))))


def read(file: Path, images: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The label of each of `images`, the place of its class in `classes`.

    Classes are names, or numbers from 0 on in the order of `classes`; those of ILSVRC2012's ground truth count from 1, in an
    order that meta.mat beside the file says. Raises UserError for an image without a class and a class that is none.
    """
    rows = _rows(file)
    given = {}
    stems = {Path(path).stem: path for path in images}
    for row in rows:
        if len(row) > 1 and (path := stems.get(Path(row[0]).stem)):
            given[path] = row[1]
    if not given and all(len(row) == 1 for row in rows):
        if len(rows) != len(images):
            raise UserError(f"data.data_dir: {file} has {len(rows)} lines for {len(images)} images; it should have {_FORMS}")
        given = {path: row[0] for path, row in zip(images, rows, strict=True)}
    if without := [path for path in images if path not in given]:
        raise UserError(f"data.data_dir: {file} gives no class to {without[0]}; it should have {_FORMS}")
    return _numbers(file, given, images, classes)


def _rows(file: Path) -> list[list[str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data.data_dir: {file} cannot be read ({e}); it should have {_FORMS}") from e
    return [[word.strip("\"'") for word in re.split(r"[\s,;]+", line.strip())] for line in text.splitlines() if line.strip()]


def _last_column(rows: list[list[str]]) -> list[str]:
    return [row[min(1, len(row) - 1)] for row in rows]


def _numbers(file: Path, given: dict[str, str], images: Sequence[str], classes: Sequence[str]) -> list[int]:
    place = {name: label for label, name in enumerate(classes)}
    words = set(given.values())
    if not words <= place.keys() and all(word.isdecimal() for word in words):
        numbers = {int(word) for word in words}
        if (file.parent / "meta.mat").is_file():
            names = _meta(file.parent / "meta.mat")
            place = {word: place[names[int(word)]] for word in words if names.get(int(word)) in place}
        elif 0 in numbers and max(numbers) < len(classes):
            place = {word: int(word) for word in words}
        else:
            raise UserError(
                f"data.data_dir: {file} gives numbers from {min(numbers)} to {max(numbers)}, whose order only a list of the "
                "classes tells; put the development kit's meta.mat beside it, or name the classes as their folders are"
            )
    for path in images:
        if given[path] not in place:
            raise UserError(
                f"data.data_dir: {file} gives {path} the class '{given[path]}', of which there are no training images; remove "
                "such images, or add the class"
            )
    return [place[given[path]] for path in images]


def _meta(file: Path) -> dict[int, str]:
    """{ILSVRC2012_ID: WordNet's id} of ImageNet's development kit."""
    import scipy.io

    try:
        rows = scipy.io.loadmat(file, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as e:  # MATLAB's files and what may be in them
        raise UserError(f"data.data_dir: {file} is not the development kit's meta.mat; copy it again") from e
