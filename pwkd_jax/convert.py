"""Weights of other projects, as a teacher or a student of this one.

    python -m pwkd_jax.convert resnet32x4.pth --model resnet32x4 --out resnet32x4.safetensors
    python -m pwkd_jax.train --config=configs/cifar100.py --config.teacher.weights=resnet32x4.safetensors --workdir=...

Reads .safetensors, .npz, a directory that Orbax saved (of either of its interfaces), and PyTorch checkpoints where PyTorch is
installed. Names are those of RepDistiller, mdistiller, torchvision, timm, or Hugging Face's transformers (residual networks for
ImageNet and vision transformers), or ours, params/stem_conv/kernel, as a Linen tree or a state of Flax NNX has them. Only
arrays are loaded: a file that holds anything else is refused. Every array has to find its place: what is missing, left over or
of another shape is listed, and so is what is left out because a frozen network has no use for it.

A file does not say by which mean and deviation its images were normalised: give --mean and --std, unless timm's config.json or
transformers' preprocessor_config.json lies beside it, or it is a CIFAR-100 or an ImageNet network of those projects. Where
config.json states layers that the model has not, it is refused. Exits with code 2 and one sentence on a mistake.
"""

import argparse
import sys
from collections.abc import Sequence

from pwkd_jax import storage
from pwkd_jax.errors import UserError, run_command
from pwkd_jax.weights.convert import convert


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pwkd_jax.convert", description=__doc__.partition("\n")[0])
    parser.add_argument("file", help=".safetensors, .npz, a directory of Orbax, .pth, .pt, .tar or .bin; in the names of "
                        "torchvision, timm, transformers, RepDistiller, mdistiller, or ours (params/conv/kernel)")  # fmt: skip
    parser.add_argument("--model", required=True, help="what it is, as in resnet32x4 or imagenet_ResNet34")
    parser.add_argument("--out", required=True, help="FILE.safetensors; its card goes beside it")
    parser.add_argument("--image-size", type=int, help="of training; 224 for ImageNet models and transformers, otherwise 32")
    parser.add_argument("--channels", type=int, default=3, help="of the images")
    parser.add_argument("--mean", type=_numbers, help="by which training normalised pixels in [0, 1], as in 0.5,0.5,0.5; not "
                        "needed for CIFAR-100 and ImageNet networks of the reference projects, nor beside timm's "
                        "config.json or transformers' preprocessor_config.json")  # fmt: skip
    parser.add_argument("--std", type=_numbers, help="the same")
    parser.add_argument("--key", default="", help="which network of several in it, as in state_dict_ema, teacher or ema_params")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="what to leave out, as in 'teacher.*'")
    options = parser.parse_args(arguments)
    try:
        card = convert(**vars(options) | {"file": storage.path(options.file), "out": storage.path(options.out, "--out")})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    normalised = f"mean {card['mean']}, std {card['std']}"
    print(f"{options.out}: {card['model']}, {card['num_classes']} classes, {card['parameters']:,} parameters; {normalised}")
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' should be numbers with commas, as in 0.5,0.5,0.5") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
