"""What the files beside weights of the Hugging Face Hub say that the weights do not: options of the layers, and normalisation.

`config.json` of transformers states layers whose arrays would fit another network as well; those that no family here has are
refused. It, of timm, and `preprocessor_config.json`, of transformers, state mean, deviation and size of the images.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.models.resnet import ResNet
from pwkd_jax.models.vit import ViT

EPSILON = 1e-6  # of the layer norms here


class Beside(NamedTuple):
    """Of images: per channel, of pixels in [0, 1], and in pixels, None where not known; and the file that states the two."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    place: Path | None = None


def read(file: Path) -> Beside:
    """What is said of the images of a file of weights; nothing of a directory, or where there is no such file beside."""
    config, images = _json(file, "config.json"), _json(file, "preprocessor_config.json")
    timm = config.get("pretrained_cfg")
    if isinstance(timm, dict):
        size = timm.get("input_size")
        size = size[-1] if isinstance(size, list) and size else None
        return _checked(timm.get("mean"), timm.get("std"), size, file.with_name("config.json"))
    if "model_type" not in config:
        return Beside()
    given = images if images.get("do_normalize", True) and images.get("do_rescale", True) else {}
    place = file.with_name("preprocessor_config.json")
    return _checked(given.get("image_mean"), given.get("image_std"), config.get("image_size"), place)


def refuse_unlike(file: Path, model: nn.Module, name: str, hugging: bool) -> None:
    """UserError where the config beside a file states layers that `model` (called `name`) has not. hugging: whether the file
    has the names of transformers; then what is not the same but close, or not stated, is said on standard error."""
    config = _json(file, "config.json")
    if "pretrained_cfg" in config and isinstance(model, ResNet) and re.search("aa|blur", str(config.get("architecture"))):
        raise UserError(
            f"{file.with_name('config.json')}: architecture is {config['architecture']}, which blurs before its strides, and "
            f"'{name}' does not, so these weights would be another function here"
        )
    if not hugging:
        return
    family, wanted = "resnet", {"hidden_act": "relu", "downsample_in_first_stage": False}
    if isinstance(model, ViT):
        family, wanted = "vit", {"hidden_act": "gelu", "num_attention_heads": model.heads}
    elif model.bottleneck:
        wanted["downsample_in_bottleneck"] = False
    if config.get("model_type") != family:
        stated = ", ".join(f"{key}={value}" for key, value in wanted.items())
        print(f"note: beside {file} lies no config.json of transformers' '{family}'; taken for granted are {stated}",
              file=sys.stderr)  # fmt: skip
        return
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{file.with_name('config.json')}: {key} is {config[key]}, and '{name}' has {value}, so these weights would be "
                "another function here"
            )
    epsilon = config.get("layer_norm_eps", EPSILON)
    if family == "vit" and epsilon != EPSILON:
        if not (isinstance(epsilon, float) and epsilon <= 1e-5):
            raise UserError(
                f"{file.with_name('config.json')}: layer_norm_eps is {epsilon}, and '{name}' has {EPSILON:g}; "
                "up to 1e-5 would fit"
            )
        print(f"note: {file} was trained with layer_norm_eps {epsilon:g}, and layer norms here add {EPSILON:g}; logits "
              "differ in their last digits", file=sys.stderr)  # fmt: skip


def _json(file: Path, name: str) -> dict:
    if storage.is_folder(file) or not storage.is_file(file.with_name(name)):
        return {}
    try:
        found = json.loads(storage.read(file.with_name(name)))
    except (OSError, ValueError, RecursionError):
        return {}  # of whatever else lies there
    return found if isinstance(found, dict) else {}


def _checked(mean: Any, std: Any, size: Any, place: Path) -> Beside:
    def numbers(x: Any) -> bool:
        return isinstance(x, list) and bool(x) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in x)

    size = size if type(size) is int and size > 0 else None
    if not (numbers(mean) and numbers(std) and len(mean) == len(std)):
        return Beside(size=size)
    return Beside(tuple(map(float, mean)), tuple(map(float, std)), size, place)
