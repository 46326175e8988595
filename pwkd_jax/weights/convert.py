"""A trained network's weights, in other projects' names or in ours, as a file of this project."""

import sys
from collections.abc import Sequence
from pathlib import Path

from flax.traverse_util import flatten_dict

from pwkd_jax import models, weights
from pwkd_jax.data import check_normalisation
from pwkd_jax.errors import UserError
from pwkd_jax.weights import beside, names, pytorch, sources, trees

# (mean, std) of pixels in [0, 1], which the reference projects trained with: RepDistiller and mdistiller on CIFAR-100;
# torchvision, and mdistiller after it, on ImageNet.
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def convert(
    file: Path, model: str, out: Path, image_size: int | None = None, channels: int = 3,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None, ignore: Sequence[str] = (), key: str = "",
) -> dict:  # fmt: skip
    """Write `file`'s weights as `out` and return their card. Raises UserError; then nothing is written.

    mean, std: per channel, of pixels in [0, 1], by which its training normalised images; otherwise those that the files beside
    it state, or see `normalisation`.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out: '{out}' should be a name ending in .safetensors")
    for option, value in (("--image-size", image_size), ("--channels", channels)):
        if value is not None and value < 1:
            raise UserError(f"{option}: {value} is not possible; it should be at least 1")
    # First, for a wrong name should not wait for a large file.
    known, more = models.create(model), models.create(model, num_classes=11)
    stated = beside.read(file)
    if not (mean or std) and len(stated.mean or ()) == channels:
        mean, std = stated.mean, stated.std
        print(f"note: images are normalised as {stated.place} says; --mean and --std change that", file=sys.stderr)
    _check_given(model, channels, mean, std)
    whole, digest = sources.read(file, key)
    found = sources.without(file, whole, ignore)
    pytorch.refuse_narrow(str(file), found)
    size = image_size or stated.size or (224 if model.startswith(("imagenet_", "vit_")) else 32)
    shape = (size, size, channels)
    own = trees.own(found)
    classes = trees.classes(known, more, shape, found) if own else pytorch.classes(known, found)
    if classes is None:
        raise UserError(f"{file}: does not fit '{model}': there is no classifier among its {len(whole)} tensors")
    network = models.create(model, num_classes=classes)
    to_flax = trees.to_flax if own else pytorch.to_flax
    try:
        variables = to_flax(str(file), model, network, shape, found)
    except UserError as e:
        if other := _fits(model, classes, channels, found):
            raise UserError(f"{file}: does not fit '{model}', but '{other}': use --model={other}") from e
        raise
    (trees if own else names).say_left_out(str(file), found)
    if not own:
        project = names.project(network, flatten_dict(variables), found)
        beside.refuse_unlike(file, network, model, project in (names.transformers, names.transformers5))
    mean, std = (mean, std) if mean else normalisation(model, classes, shape)
    card = weights.card(model, 1.0, 0, classes, shape, mean, std, {"file": file.name, "sha256": digest})
    try:
        weights.write(out, variables, card)
    except OSError as e:
        raise UserError(f"--out: '{out}' cannot be written ({e.strerror})") from e
    return card


def _fits(model: str, classes: int, channels: int, found: dict) -> str:
    """The namesake for small images or for ImageNet's that these tensors fit; '' where there is none."""
    large = model.startswith("imagenet_")
    other, size = (model.removeprefix("imagenet_"), 32) if large else (f"imagenet_{model}", 224)
    to_flax = trees.to_flax if trees.own(found) else pytorch.to_flax
    try:
        to_flax("", other, models.create(other, num_classes=classes), (size, size, channels), found)
    except UserError:
        return ""
    return other


def normalisation(model: str, classes: int, image_shape: Sequence[int]) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) by which the reference projects train a model of this name, as far as that is known: residual and mobile
    networks on ImageNet's 1000 classes, and the small ones on CIFAR-100. Raises UserError for any other."""
    if model.startswith("imagenet_") and classes == 1000 and image_shape[2] == 3:
        return IMAGENET
    small = not model.startswith(("imagenet_", "vit_")) and ":" not in model  # one's own may have been trained in any way
    if small and classes == 100 and tuple(image_shape) == (32, 32, 3):
        return CIFAR100
    size = "x".join(map(str, image_shape))
    raise UserError(
        f"--mean, --std: give those that these weights were trained with, of pixels in [0, 1], as in --mean=0.5,0.5,0.5; their "
        f"file does not say, and '{model}' for {classes} classes of {size} images is of no reference project"
    )


def _check_given(model: str, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if mean or std:
        if not (mean and std and len(mean) == len(std) == channels):
            raise UserError(f"--mean, --std: each should be {channels} numbers, one a channel, and both given together")
        check_normalisation(mean, std, "--mean", "--std")
    elif model.startswith("vit_"):
        raise UserError(
            "--mean, --std: give those that these weights were trained with; timm's own have 0.5,0.5,0.5 for both, "
            "DeiT's and torchvision's 0.485,0.456,0.406 and 0.229,0.224,0.225"
        )
