"""A data set's shapes and sizes without its images: all that compiling for another machine needs."""

import os

import numpy as np
from ml_collections import ConfigDict

from pwkd_jax.data import slices, sources
from pwkd_jax.data.splits import Dataset, Split
from pwkd_jax.errors import UserError

# {name: (image shape, {split: images}, classes)}. ImageNet's images have many sizes; 224 is the literature's.
KNOWN = {
    "digits": ((8, 8, 1), {"train": 1198, "test": 599}, 10),
    "cifar10": ((32, 32, 3), {"train": 50_000, "test": 10_000}, 10),
    "cifar100": ((32, 32, 3), {"train": 50_000, "test": 10_000}, 100),
    "imagenet2012": ((224, 224, 3), {"train": 1_281_167, "validation": 50_000}, 1000),
    "tiny_imagenet100_32": ((32, 32, 3), {"train": 50_000, "validation": 5_000}, 100),
}


def outline(config: ConfigDict, images: int = 0, image_size: int = 0) -> tuple[Dataset, str]:
    """(the data set of config.data with arrays of its shapes that hold nothing, where the shapes come from).

    From `data_dir` where it lies there, else from the table of well-known sets. images: of training in place of what these
    say; image_size: height and width likewise, as config.data.image_size. Raises UserError where something is not known.
    """
    d, base = config.data, config.data.name.partition(":")[0].partition("/")[0]
    shape, splits, classes = KNOWN.get(base, (None, {}, 0))
    source = f"as {base} is known" if shape else "as you say"
    if base != "digits" and (found := _stored(d.name, d.data_dir)):
        stored, splits, own = found
        shape, classes, source = stored if all(stored) else shape, own or classes, "as stored in data.data_dir"
    if d.num_classes and classes and d.num_classes != classes:
        raise UserError(f"data.num_classes: it says {d.num_classes}, but data set '{d.name}' has {classes} classes")
    classes = classes or d.num_classes
    if size := image_size or d.get("image_size", 0):
        shape = (size, size, shape[-1] if shape else len(d.mean) or 3)
    if not shape or not classes or not (splits or images):
        missing = "--image-size" if not shape else "--config.data.num_classes" if not classes else "--images"
        raise UserError(f"data.name: '{d.name}' is neither in data.data_dir nor a well-known set; add {missing}=N")
    shards = {name: [count] for name, count in splits.items()}
    train, test = (
        slices.length(f"data.{key}", d[key], d.name, shards) if splits else images
        for key in ("train_split", "test_split")
    )
    held = slices.length("data.validation_split", d.validation_split, d.name, shards) if d.validation_split and splits else 0
    validation = _empty(held, shape) if held else None
    return Dataset(d.name, _empty(images or train, shape), _empty(test, shape), classes, validation=validation), source


def _stored(name: str, data_dir: str) -> tuple[tuple, dict[str, int], int] | None:
    """(image shape, {split: images}, classes) of a prepared set, from its metadata alone; None where it does not lie there."""
    try:
        directory = sources._find(name, data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", bool(data_dir))
    except UserError:
        return None
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(directory).info
    features = info.features
    shape = tuple(features["image"].shape) if "image" in features else ()
    classes = getattr(features["label"], "num_classes", None) if "label" in features else None
    return shape, {split: part.num_examples for split, part in info.splits.items()}, classes or 0


def _empty(images: int, shape: tuple[int, int, int]) -> Split:
    # One zero, seen everywhere: ImageNet's 193 GB are not allocated.
    return Split(np.broadcast_to(np.uint8(0), (images, *shape)), np.broadcast_to(np.int32(0), (images,)))
