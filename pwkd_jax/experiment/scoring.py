"""Scores of whatever training, export or conversion left, on any data set, alone or beside a teacher."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pwkd_jax import data, storage
from pwkd_jax.data import class_names, copied
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import exported, loading
from pwkd_jax.experiment.starting import other_classes
from pwkd_jax.reporting import per_class as classes
from pwkd_jax.training import distributed, record
from pwkd_jax.training.evaluation import predictor, score_predictions

KINDS = f"{loading.KINDS}, or an exported .stablehlo program or .onnx model"


class Scored(NamedTuple):
    """log_probabilities(uint8 images) -> [B, classes], asynchronous; devices: how many share a batch."""

    log_probabilities: Callable
    title: str
    image_shape: tuple[int, ...]
    num_classes: int
    data: dict
    devices: int


def evaluate(
    target: str, width: float | None = None, teacher: str | None = None, teacher_width: float | None = None,
    data: str | None = None, data_dir: str | None = None, split: str | None = None, batch_size: int = 256, model: str = "",
    image_size: int | None = None, resize: int | None = None, workers: int = -1, copy: str = "", per_class: bool = False,
    confusion: str = "",
) -> dict:  # fmt: skip
    """{"target", "model", "data", "split", "num_classes", "images", "images_per_second", the keys of `scores.summary`, and with
    a teacher "teacher": {"target", "model", its own scores}}; by `per_class` also "classes", see `reporting.per_class.rows`.
    confusion: a CSV file to write the confusion matrix into, which is then named there. Several processes share the images
    and all call it. Raises UserError."""
    if batch_size < 1:
        raise UserError(f"--batch-size: {batch_size} is not possible; it should be at least 1")
    if teacher_width is not None and teacher is None:
        raise UserError("--teacher-width: needs --teacher")
    place = _table(confusion) if confusion else None

    def opened() -> tuple:
        return _opened(target, width, teacher, teacher_width, data, data_dir, split, model, image_size, resize, workers, copy)

    own, taught, name, part, images, names = distributed.together(opened)
    result = {"target": target, "model": own.title, "data": name, "split": part, "num_classes": own.num_classes}
    result |= score_predictions(
        own.log_probabilities, images, teacher=taught and taught.log_probabilities, batch_size=batch_size,
        devices=max(own.devices, taught.devices if taught else 1), names=(target, teacher or ""),
        classes=per_class or place is not None,
    )  # fmt: skip
    if taught:
        result["teacher"] = {"target": teacher, "model": taught.title, **result["teacher"]}
    labels, predicted = result.pop("labels", None), result.pop("predicted", None)
    beside = result["teacher"].pop("predicted", None) if taught else None
    if per_class:
        result["classes"] = classes.rows(labels, predicted, own.num_classes, names, beside)
    if place is not None:
        content = classes.as_csv(classes.matrix(labels, predicted, own.num_classes), names)
        distributed.decide(lambda: _write(place, content))
        result["confusion"] = confusion
    return result


def _table(confusion: str) -> Path:
    """The place of --confusion. Raises UserError, before any image is read, where it is none for a file."""
    place = storage.path(confusion, "--confusion")
    if place.suffix != ".csv":
        raise UserError(f"--confusion: '{confusion}' should be a name ending in .csv")
    if distributed.decide(lambda: storage.is_folder(place)):
        raise UserError(f"--confusion: '{confusion}' is a folder; give the name of a file")
    return place


def _write(place: Path, content: str) -> None:
    try:
        storage.replace(place, content)
    except OSError as error:
        raise UserError(f"--confusion: '{place}' cannot be written ({error.strerror})") from error


def _opened(
    target: str, width: float | None, teacher: str | None, teacher_width: float | None, data: str | None, data_dir: str | None,
    split: str | None, model: str, image_size: int | None, resize: int | None, workers: int, copy: str,
) -> tuple[Scored, Scored | None, str, str, data.Split | data.Stream, Sequence[str]]:  # fmt: skip
    """(the network, its teacher, the data set, the split, its images, the names of their classes or none) that a command names.
    Raises UserError."""
    own = open_target(target, width, model)
    taught = open_target(teacher, teacher_width, model) if teacher else None
    name, split = data or own.data["name"], split or (own.data["test_split"] if data is None else "test")
    if not name:
        raise UserError(f"--data: {target} does not say what it was trained on; name a data set")
    folder = data_dir if data_dir is not None else (own.data["data_dir"] if data is None else "")
    known = own.data if data is None else {}
    if name == "folder" and not folder:
        raise UserError(f"--data-dir: {target} does not say where its folder of images lies; add --data-dir=DIR")
    folder = copied(name, folder, copy or known.get("copy", ""), {"--split": split})
    images = _split(name, folder, split, own, target, image_size, resize, workers, known)
    digest = own.data.get("digest") if data is None and split == own.data["test_split"] else None
    if digest and record.of_split(images) not in (None, digest):
        print(f"warning: the {split} split of '{name}' holds other images or labels than those of {target}", file=sys.stderr)
    names = class_names(name, folder, split)
    images = _in_order(images, own.data.get("classes", ()), names, target, name)
    if taught and taught.data.get("classes") and own.data.get("classes") and taught.data["classes"] != own.data["classes"]:
        raise UserError(f"--teacher: {teacher} {other_classes(taught.data['classes'], own.data['classes'])}, unlike {target}")
    if taught and (taught.image_shape, taught.num_classes) != (own.image_shape, own.num_classes):
        raise UserError(f"--teacher: {teacher} {_takes(taught)}, but {target} {_takes(own)}")
    return own, taught, name, split, images, own.data.get("classes") or names


def _split(
    name: str, folder: str, split: str, own: Scored, target: str, size: int | None, resize: int | None, workers: int,
    known: dict,
) -> data.Split | data.Stream:  # fmt: skip
    if size is None:
        size = known.get("image_size")
    if size is None:
        size = own.image_shape[0] if data.many_sizes(name, folder, split) else 0
    if size < 0 or workers < -1:
        raise UserError("--image-size and --workers: take 0 or more, and --workers also -1 for one a core")
    streaming, pixel_range = None, tuple(known.get("pixel_range", ()))
    if size:
        # Of a run whose images were in RAM, it says nothing of how larger ones become as large.
        resize = resize or (known.get("resize") if known.get("image_size") else 0) or round(size * 8 / 7)
        if resize < size:
            raise UserError(f"--resize: {resize} pixels are fewer than the {size} that are cropped from them")
        streaming = data.Streaming(size, resize=resize, workers=workers, pixel_range=pixel_range)
    images, classes = data.load_split(name, folder, split, streaming=streaming, pixel_range=pixel_range)
    if tuple(images.image_shape) != tuple(own.image_shape) or classes != own.num_classes:
        size = "x".join(map(str, images.image_shape))
        raise UserError(f"--data: '{name}' has {size} images in {classes} classes, but {target} {_takes(own)}")
    return images


def _in_order(
    images: data.Split | data.Stream, known: Sequence[str], given: Sequence[str], target: str, name: str
) -> data.Split | data.Stream:
    """The images with labels in the order of the classes that the network knows. Raises UserError where they are others, or
    where they are streamed in another order."""
    known, given = list(known), list(given)
    if not known or not given or known == given:
        return images
    if sorted(known) != sorted(given) or not isinstance(images, data.Split):
        raise UserError(f"--data: {target} {other_classes(known, given)} of '{name}'; name data of its classes, in its order")
    place = np.array([known.index(name) for name in given], np.int32)
    print(f"note: {target} knows the classes of '{name}' in another order; they are matched by name", file=sys.stderr)
    return dataclasses.replace(images, labels=place[images.labels])


def _takes(scored: Scored) -> str:
    return f"takes {'x'.join(map(str, scored.image_shape))} images and knows {scored.num_classes} classes"


def open_target(target: str, width: float | None = None, model: str = "") -> Scored:
    """What a command names, ready to predict. Raises UserError."""
    if (kind := Path(target).suffix) in (".stablehlo", ".onnx"):
        for option, value in (("--width", width), ("--model", model)):
            if value:
                raise UserError(f"{option}: {target} is a program, of one model and width")
        program = (exported.open_onnx if kind == ".onnx" else exported.open_program)(storage.path(target))
        title = f"a program for {', '.join(program.platforms)}"
        return Scored(program.log_probabilities, title, program.image_shape, program.num_classes, program.data, 1)
    found, known = loading.load(target, width, model, KINDS)
    card = found.card
    title = f"{card['model']}" + (f" at width {card['width']:g}" if card["width"] != 1 else "")
    title += f", {card['parameters']:,} parameters, {card['macs']:,} MACs an image"

    log_probabilities, devices = predictor(found)
    return Scored(log_probabilities, title, tuple(card["image_shape"]), card["num_classes"], known, devices)
