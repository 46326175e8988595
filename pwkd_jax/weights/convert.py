"""A PyTorch network's weights as a file of this project."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from pwkd_jax import models, weights
from pwkd_jax.errors import UserError
from pwkd_jax.weights import pytorch

# Of pixels in [0, 1]: what the reference projects trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def convert(
    file: Path, model: str, out: Path, image_size: int | None = None, channels: int = 3,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None, ignore: Sequence[str] = (), key: str = "",
) -> dict:  # fmt: skip
    """Write `file`'s weights as `out` and return their card. Raises UserError; then nothing is written."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out: '{out}' should be a name ending in .safetensors")
    for option, value in (("--image-size", image_size), ("--channels", channels)):
        if value is not None and value < 1:
            raise UserError(f"{option}: {value} is not possible; it should be at least 1")
    known = models.create(model)  # first, for a wrong name should not wait for a large file
    if model.startswith("vit_") and not (mean and std):
        raise UserError(
            "--mean, --std: give those that these weights were trained with; timm's own have 0.5,0.5,0.5 for both, "
            "DeiT's and torchvision's 0.485,0.456,0.406 and 0.229,0.224,0.225"
        )
    found = pytorch.read(file, key)
    pytorch.refuse_narrow(str(file), found, ignore)
    classes = pytorch.classes(known, found)
    if classes is None:
        raise UserError(f"{file}: does not fit '{model}': there is no classifier among its {len(found)} tensors")
    large = model.startswith(("imagenet_", "vit_"))
    default_mean, default_std = IMAGENET if large else CIFAR100
    size = image_size or (224 if large else 32)
    shape, mean, std = (size, size, channels), mean or default_mean, std or default_std
    if not len(mean) == len(std) == channels or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise UserError(f"--mean, --std: each should be {channels} numbers, one a channel, and those of --std above 0")
    with open(file, "rb") as content:
        source = {"file": file.name, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
    network = models.create(model, num_classes=classes)
    variables = pytorch.to_flax(str(file), model, network, shape, found, ignore)
    card = weights.card(model, 1.0, 0, classes, shape, mean, std, source)
    try:
        weights.write(out, variables, card)
    except OSError as e:
        raise UserError(f"--out: '{out}' cannot be written ({e.strerror})") from e
    return card
