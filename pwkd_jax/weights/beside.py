"""What the files beside weights of the Hugging Face Hub say that the weights do not: options of the layers, and normalisation.

`config.json` of transformers states layers whose arrays would fit another network as well; those that no family here has are
refused. It, of timm, and `preprocessor_config.json`, of transformers, state mean, deviation and size of the images.
"""

import json
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
    """Of images: per channel, of pixels in [0, 1], and in pixels. None is not known."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None


def read(file: Path) -> Beside:
    """What is said of the images of a file of weights; nothing of a directory, or where there is no such file beside."""
    config, images = _json(file, "config.json"), _json(file, "preprocessor_config.json")
    timm = config.get("pretrained_cfg")
    if isinstance(timm, dict):
        size = timm.get("input_size")
        size = size[-1] if isinstance(size, list) and size else None
        return _checked(timm.get("mean"), timm.get("std"), size)
    if "model_type" not in config:
        return Beside()
    given = images if images.get("do_normalize", True) and images.get("do_rescale", True) else {}
    return _checked(given.get("image_mean"), given.get("image_std"), config.get("image_size"))


def refuse_unlike(file: Path, model: nn.Module, name: str) -> None:
    """UserError where the config of transformers states layers that `model` (called `name`) has not. What is not the same but
    close, or not stated, is said on standard error."""
    config = _json(file, "config.json")
    wanted: dict[str, Any]
    if isinstance(model, ViT):
        family, wanted = "vit", {"hidden_act": "gelu", "num_attention_heads": model.heads}
    elif isinstance(model, ResNet):
        family, wanted = "resnet", {"hidden_act": "relu", "downsample_in_first_stage": False}
        wanted |= {"downsample_in_bottleneck": False} if model.bottleneck else {}
    else:
        return
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


def _checked(mean: Any, std: Any, size: Any) -> Beside:
    def numbers(x: Any) -> bool:
        return isinstance(x, list) and bool(x) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in x)

    whole = numbers(mean) and numbers(std) and len(mean) == len(std)
    known = isinstance(size, int) and size > 0
    return Beside(
        tuple(map(float, mean)) if whole else None, tuple(map(float, std)) if whole else None, size if known else None
    )
