"""Weights in files: safetensors with a card.

    FILE.safetensors   the arrays of a model's variables, named by their paths (`params/stage1_block1/conv1/kernel`), in this
                       project's layouts; its metadata hold the card, so that the file is enough
    FILE.json          the card again, for people

A card says how to build the model and what it expects: {"model", "width", "divisor", "num_classes", "image_shape": [H, W, C],
"mean", "std": per channel, of pixels in [0, 1], "parameters", "macs", and, for a record, "source"}.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import models
from pwkd_jax.errors import UserError
from pwkd_jax.files import replace
from pwkd_jax.models import costs


def card(
    name: str, width: float, divisor: int, num_classes: int, image_shape: Sequence[int], mean: Sequence[float],
    std: Sequence[float], source: dict,
) -> dict:  # fmt: skip
    """The card of the model `name`; its costs are counted here. Raises UserError for what cannot be built."""
    result = {
        "model": name, "width": width, "divisor": divisor, "num_classes": num_classes, "image_shape": list(image_shape),
        "mean": list(mean), "std": list(std),
    }  # fmt: skip
    model = build(result)
    return result | {
        "parameters": costs.parameters(model, tuple(image_shape)),
        "macs": costs.macs(model, tuple(image_shape)),
        "source": source,
    }


def build(card: dict) -> nn.Module:
    """The model that a card describes."""
    return models.create(
        card["model"], width=card["width"], num_classes=card["num_classes"], divisor=card["divisor"]
    )


def write(path: Path, variables: dict, card: dict) -> None:
    """Write `path` (FILE.safetensors) and its card beside it; both are whole at every instant. Raises OSError."""
    arrays = {key: np.ascontiguousarray(jax.device_get(x)) for key, x in flatten_dict(variables, sep="/").items()}
    metadata = {"format": "pwkd_jax", "card": json.dumps(card)}
    replace(path, safetensors.numpy.save(arrays, metadata))
    replace(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")


def read(path: Path, model: str = "") -> tuple[dict, dict]:
    """(variables, card) of a file that `write` made, compared with the model before anything is returned.

    model: the `module:Name` that it may import, where it holds a model of someone's own. Raises UserError for a file that is
    missing, torn, of another program, or that does not hold what its card says.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: is no .safetensors file; make one of PyTorch weights with python -m pwkd_jax.convert")
    arrays, metadata = tensors(path)
    try:
        found = json.loads(metadata["card"])
        if "assisted" in found:
            raise UserError(
                f"{path}: holds a student that predicts through its teacher's classifier ({found['assisted']['distiller']}); "
                "use its program (.stablehlo), or the run that it came from"
            )
        if ":" in found["model"] and found["model"] != model:
            # A file may come from anywhere; it must not choose what is imported here.
            raise UserError(f"{path}: holds '{found['model']}', a model that is not built in; name it to allow its import")
        abstract = models.abstract(build(found), tuple(found["image_shape"]))
        if not len(found["mean"]) == len(found["std"]) == found["image_shape"][2] or "source" not in found:
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{path}: has no card of this project; python -m pwkd_jax.convert makes a file with one from other weights"
        ) from e
    variables = unflatten_dict({tuple(key.split("/")): x for key, x in arrays.items()})
    refuse_misfits(str(path), found["model"], mismatches(variables, abstract))
    return variables, found


def tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of any safetensors file. Raises UserError for one that is missing or torn."""
    refuse_missing(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as e:
        reason = re.sub(r"^Error while deserializing header: |^Error while deserializing: ", "", str(e))
        raise UserError(f"{path}: is not a whole safetensors file ({reason})") from e


def refuse_missing(path: Path) -> None:
    """UserError unless `path` is a file."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a directory' if path.is_dir() else 'there is no such file'}")


def mismatches(variables: dict, like: dict) -> list[str]:
    """What keeps `variables` from being those of a model: one phrase an array, [] where all fits."""
    a, b = flatten_dict(variables, sep="/"), flatten_dict(like, sep="/")
    phrases = [f"{key} is not in it" for key in sorted(b.keys() - a.keys())]
    phrases += [f"{key} is not wanted" for key in sorted(a.keys() - b.keys())]
    for key in sorted(a.keys() & b.keys()):
        if a[key].shape != b[key].shape:
            phrases.append(f"{key} is {list(a[key].shape)}, not {list(b[key].shape)}")
        elif bad := unusable(a[key]):
            phrases.append(f"{key} {bad}")
    return phrases


def unusable(array: np.ndarray) -> str:
    """What keeps an array from being a weight, as a phrase; '' for none."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"is {array.dtype}, not a floating-point array"
    return "" if np.isfinite(array.astype(np.float32)).all() else "holds values that are not finite"


def refuse_misfits(where: str, model: str, phrases: Iterable[str]) -> None:
    """UserError naming the first few of `phrases`, if there are any."""
    phrases = list(phrases)
    if phrases:
        more = f"; and {len(phrases) - 5} more" if len(phrases) > 5 else ""
        raise UserError(f"{where}: does not fit '{model}': {'; '.join(phrases[:5])}{more}")
