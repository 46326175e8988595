"""Weights from PyTorch projects, as a teacher or a student of this one.

    python -m pwkd_jax.convert resnet32x4.pth --model resnet32x4 --out resnet32x4.safetensors
    python -m pwkd_jax.train --config=configs/cifar100.py --config.teacher.weights=resnet32x4.safetensors --workdir=...

Reads .safetensors, and PyTorch checkpoints where PyTorch is installed, in the names of RepDistiller, mdistiller, torchvision
and timm. Only tensors are loaded: a file that holds anything else is refused. Every tensor has to find its place: what is
missing, left over or of another shape is listed. Exits with code 2 and one sentence on a mistake.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pwkd_jax import models, weights
from pwkd_jax.errors import UserError
from pwkd_jax.weights import pytorch

# Of pixels in [0, 1]: what the reference projects trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pwkd_jax.convert", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help=".safetensors, .pth, .pt, .tar or .bin")
    parser.add_argument("--model", required=True, help="what it is, as in resnet32x4 or imagenet_ResNet34")
    parser.add_argument("--out", type=Path, required=True, help="FILE.safetensors; its card goes beside it")
    parser.add_argument("--image-size", type=int, help="of training; 224 for ImageNet models and transformers, otherwise 32")
    parser.add_argument("--channels", type=int, default=3, help="of the images")
    parser.add_argument("--mean", type=_numbers, help="by which images were normalised, as in 0.5,0.5,0.5; that of the "
                        "reference projects where it is not given, but for transformers, which have two")  # fmt: skip
    parser.add_argument("--std", type=_numbers, help="the same")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="what to leave out, as in 'teacher.*'")
    options = parser.parse_args(arguments)
    try:
        card = convert(**vars(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    normalised = f"mean {card['mean']}, std {card['std']}"
    print(f"{options.out}: {card['model']}, {card['num_classes']} classes, {card['parameters']:,} parameters; {normalised}")
    return 0


def convert(
    file: Path, model: str, out: Path, image_size: int | None = None, channels: int = 3,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None, ignore: Sequence[str] = (),
) -> dict:  # fmt: skip
    """Write `file`'s weights as `out` and return their card. Raises UserError; then nothing is written."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out: '{out}' should be a name ending in .safetensors")
    for key, value in (("--image-size", image_size), ("--channels", channels)):
        if value is not None and value < 1:
            raise UserError(f"{key}: {value} is not possible; it should be at least 1")
    known = models.create(model)  # first, for a wrong name should not wait for a large file
    if model.startswith("vit_") and not (mean and std):
        raise UserError(
            "--mean, --std: give those that these weights were trained with; timm's own have 0.5,0.5,0.5 for both, "
            "DeiT's and torchvision's 0.485,0.456,0.406 and 0.229,0.224,0.225"
        )
    found = pytorch.read(file)
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


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' should be numbers with commas, as in 0.5,0.5,0.5") from None


if __name__ == "__main__":
    sys.exit(main())
