"""Images that lie flat, their classes in a file beside them: ImageNet's validation images and Tiny ImageNet as they unpack."""

import collections
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pwkd_jax.data import image_files
from pwkd_jax.data.slices import OFFER
from pwkd_jax.errors import UserError

# What such files are called, with the split's name for {}: Tiny ImageNet's, Kaggle's, those of ILSVRC2012 and of Caffe.
_NAMES = ("{}_annotations.txt", "{}_labels.txt", "{}_labels.csv", "{}.txt", "{}.csv", "LOC_{}_solution.csv", "annotations.txt",
          "annotations.csv", "labels.txt", "labels.csv", "ground_truth.txt", "{}_ground_truth.txt",
          "ILSVRC2012_validation_ground_truth.txt", "imagenet_2012_validation_synset_labels.txt")  # fmt: skip
_MARKS, _AROUND = re.compile(r"[\s,;]+"), "\"' \t\r"
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


def classes_named(file: Path, images: Sequence[str]) -> list[str]:
    """The classes that a file of classes names for `images`, or line by line, sorted. After a class may follow numbers, as of a
    box."""
    lines, find = _lines(file), _finder(images)
    named = [rest for path, rest in (_leading(line, find) for line in lines) if path and rest]
    columns = [re.split(r"[\t,;]", rest)[0].strip(_AROUND) for rest in named or lines]
    return sorted({re.sub(r"(\s+-?[\d.]+)+$", "", column) for column in columns})


def read(file: Path, images: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The label of each of `images`, the place of its class in `classes`.

    Classes are names, or numbers from 0 on in the order of `classes`; those of ILSVRC2012's ground truth count from 1, in an
    order that meta.mat beside the file says. Names may hold what else parts them: the longest that is known is taken. Raises
    UserError for an image without a class or with two, and for a class that is none.
    """
    lines, find, known = _lines(file), _finder(images), {name: name for name in classes}.get
    given: dict[str, str] = {}
    for line in lines:
        path, rest = _leading(line, find)
        if path and rest:
            label = _leading(rest, known)[0] or _MARKS.split(rest)[0].strip(_AROUND)
            if given.setdefault(path, label) != label:
                raise UserError(
                    f"data.data_dir: {file} gives {path} two classes, '{given[path]}' and '{label}'; keep the right line"
                )
    if not given and all(known(line) or not _MARKS.search(line) for line in lines):
        if len(lines) != len(images):
            raise UserError(f"data.data_dir: {file} has {len(lines)} lines for {len(images)} images; it should have {_FORMS}")
        given = dict(zip(images, lines, strict=True))
    if without := [path for path in images if path not in given]:
        raise UserError(f"data.data_dir: {file} gives no class to {without[0]}; it should have {_FORMS}")
    return _numbers(file, given, images, classes)


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data.data_dir: {file} cannot be read ({e}); it should have {_FORMS}") from e
    return [line.strip(_AROUND) for line in text.splitlines() if line.strip(_AROUND)]


def _finder(images: Sequence[str]) -> Callable[[str], str | None]:
    """name -> the image that it means: by its file's name, or without a suffix, or with another, where that is one image's."""
    count = collections.Counter(Path(path).stem for path in images)
    stems = {Path(path).stem: path for path in images if count[Path(path).stem] == 1}
    names = {Path(path).name: path for path in images}

    def find(name: str) -> str | None:
        name = os.path.basename(name)
        stem, suffix = os.path.splitext(name)
        return names.get(name) or stems.get(name) or (None if _MARKS.search(suffix) else stems.get(stem))

    return find


def _leading(text: str, find: Callable[[str], str | None]) -> tuple[str | None, str]:
    """(what `find` makes of the longest beginning of `text` that it knows, the rest); a beginning ends where a column may."""
    for mark in reversed([*_MARKS.finditer(text), None]):
        end, rest = (mark.start(), text[mark.end() :]) if mark else (len(text), "")
        if found := find(text[:end].strip(_AROUND)):
            return found, rest
    return None, ""


def _numbers(file: Path, given: dict[str, str], images: Sequence[str], classes: Sequence[str]) -> list[int]:
    place = {name: label for label, name in enumerate(classes)}
    words = set(given.values())
    if not words <= place.keys() and all(word.isdecimal() and len(word) < 10 for word in words):
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
