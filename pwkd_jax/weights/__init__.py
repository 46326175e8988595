"""Weights in files: safetensors with a card.

    FILE.safetensors   the arrays of a model's variables, named by their paths (`params/stage1_block1/conv1/kernel`), in this
                       project's layouts; its metadata hold the card, so that the file is enough, and a checksum (`files`)
    FILE.json          the card again, for people

A card says how to build the model and what it expects: {"model", "width", "divisor", "num_classes", "image_shape": [H, W, C],
"mean", "std": per channel, of pixels in [0, 1], "parameters", "macs", and, for a record, "source"}; "sees" where the network
sees these images in a way of its own (`models.sight`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import data, models, storage
from pwkd_jax.errors import UserError
from pwkd_jax.models import costs, sight
from pwkd_jax.weights import files

# What the library leaves of a student in its directory.
STUDENT = "student.safetensors"


class Network(NamedTuple):
    """A trained network: a model that `models.apply` runs, its variables, and its card."""

    model: Any
    variables: dict
    card: dict

    def __repr__(self) -> str:
        return f"Network({self.card['model']} at width {self.card['width']:g}, {self.card.get('parameters', 0):,} parameters)"

    def logits(self, images: jax.Array, variables: dict | None = None) -> jax.Array:
        """Logits [B, classes] of uint8 images [B, H, W, C], or of float ones in [0, 1]. variables: in place of its own."""
        if images.ndim != 4 or list(images.shape[1:]) != list(self.card["image_shape"]):
            raise UserError(f"images: are {list(images.shape)}, and this network takes [B, *{self.card['image_shape']}]")
        images = data.normalise(images, self.card["mean"], self.card["std"])
        return models.apply(self.model, self.variables if variables is None else variables, images, train=False)[0].logits


def card(
    name: str, width: float, divisor: int, num_classes: int, image_shape: Sequence[int], mean: Sequence[float],
    std: Sequence[float], source: dict, network: nn.Module | None = None, sees: dict | None = None,
) -> dict:  # fmt: skip
    """The card of the model `name`; its costs are counted here. network: that model, where a name alone does not build it;
    sees: how it sees images of that shape, see `models.sight`. Raises UserError for what cannot be built."""
    result = {
        "model": name, "width": width, "divisor": divisor, "num_classes": num_classes, "image_shape": list(image_shape),
        "mean": list(mean), "std": list(std), **({"sees": sees} if sees else {}),
    }  # fmt: skip
    model = network if network is not None else build(result)
    return result | {
        "parameters": costs.parameters(model, tuple(image_shape)),
        "macs": costs.macs(model, tuple(image_shape)),
        "source": source,
    }


def build(card: dict) -> nn.Module:
    """The model that a card describes."""
    network = models.create(
        card["model"], width=card["width"], num_classes=card["num_classes"], divisor=card["divisor"]
    )
    return sight.wrap(network, card.get("sees"))


def write(path: Path, variables: dict, card: dict) -> None:
    """Write `path` (FILE.safetensors) and its card beside it; both are whole at every instant. Raises OSError."""
    arrays = {key: np.asarray(jax.device_get(x), order="C") for key, x in flatten_dict(variables, sep="/").items()}
    write_arrays(path, arrays, card, "pwkd_jax")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], card: dict, form: str) -> None:
    """The same of arrays that have their names already. form: pwkd_jax, or pt for names and layouts of PyTorch."""
    storage.replace(path, files.pack(arrays, {"format": form, "card": json.dumps(card)}))
    storage.replace(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")


def save(network: Any, path: str | Path) -> None:
    """Write a `Network`, or what has one (a `Student`), as FILE.safetensors with its card. Raises UserError, OSError."""
    if hasattr(network, "save"):
        return network.save(path)
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path}: should be a name ending in .safetensors")
    write(storage.path(path), network.variables, network.card)


def read(path: Path, model: str = "", network: nn.Module | None = None) -> tuple[dict, dict]:
    """(variables, card) of a file that `write` made, compared with the model before anything is returned.

    model: the `module:Name` that it may import, where it holds a model of someone's own; network: that model itself. Raises
    UserError for a file that is missing, torn, damaged, of another program, or that does not hold what its card says.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: is no .safetensors file; make one of PyTorch weights with python -m pwkd_jax.convert")
    arrays, metadata = files.tensors(path)
    try:
        found = json.loads(metadata["card"])
        if "assisted" in found:
            raise UserError(
                f"{path}: holds a student that predicts through its distiller ({found['assisted']['distiller']}); "
                "use its program (.stablehlo), or the run that it came from"
            )
        if network is None and ":" in found["model"] and found["model"] != model:
            # A file may come from anywhere; it must not choose what is imported here.
            raise UserError(f"{path}: holds '{found['model']}', a model that is not built in; name it to allow its import")
        abstract = models.abstract(build(found) if network is None else network, tuple(found["image_shape"]))
        if not len(found["mean"]) == len(found["std"]) == found["image_shape"][2] or "source" not in found:
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{path}: has no card of this project; python -m pwkd_jax.convert makes a file with one from other weights"
        ) from e
    variables = unflatten_dict({tuple(key.split("/")): x for key, x in arrays.items()})
    refuse_misfits(str(path), found["model"], mismatches(variables, abstract))
    return variables, found


def refuse_another(path: Path, card: dict, model: str, width: float, facts: dict) -> None:
    """UserError where the file at `path`, whose card this is, is not of that model, width and data. facts: of the data."""
    wanted = {"model": model, "width": width} | {key: facts[key] for key in ("num_classes", "image_shape", "mean", "std")}
    for key, value in wanted.items():
        known = card[key]
        # Measured statistics may differ in their last digits.
        alike = key != "model" and np.shape(known) == np.shape(value) and np.allclose(known, value, atol=1e-3)
        if known != value and not alike:
            raise UserError(f"{path}: is of another network, whose {key} is {known} and not {value}; bring it back")


def write_widths(directory: Path, networks: Mapping[float, Network]) -> None:
    """Write `directory`/width_W.safetensors for {width: network}: a slimmable teacher's sub-networks. Raises OSError."""
    for width, network in networks.items():
        write(width_path(directory, width), network.variables, network.card)


def read_widths(directory: Path, likes: Mapping[float, dict], read_one: Any) -> dict[float, tuple[dict, dict]]:
    """{width: (variables, card)} of what `write_widths` wrote; likes: {width: anything with the variables' collections}.
    read_one(path, width): see `read`. Raises UserError."""
    found = {}
    for width, like in likes.items():
        variables, card = read_one(width_path(directory, width), width)
        # A file has no place for a collection without arrays: a model without batch norm has one.
        found[width] = {key: {} for key in like} | variables, card
    return found


def width_path(directory: Path, width: float) -> Path:
    return directory / f"width_{width:g}.safetensors"


def mismatches(variables: dict, like: dict) -> list[str]:
    """What keeps `variables` from being those of a model: one phrase an array, [] where all fits."""
    a, b = flatten_dict(variables, sep="/"), flatten_dict(like, sep="/")
    phrases = [f"{key} is not in it" for key in sorted(b.keys() - a.keys())]
    phrases += [f"{key} is not wanted" for key in sorted(a.keys() - b.keys())]
    for key in sorted(a.keys() & b.keys()):
        if a[key].shape != b[key].shape:
            phrases.append(f"{key} is {list(a[key].shape)}, not {list(b[key].shape)}")
        elif not jnp.issubdtype(b[key].dtype, jnp.floating):  # a count that a model of your own keeps
            phrases += [f"{key} is {a[key].dtype}, not {b[key].dtype}"] * (a[key].dtype != b[key].dtype)
        elif bad := unusable(a[key]):
            phrases.append(f"{key} {bad}")
    return phrases


def unusable(array: np.ndarray) -> str:
    """What keeps an array from being a weight, as a phrase; '' for none."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"is {array.dtype}, not a floating-point array"
    if array.dtype.itemsize < 2:
        return f"is {array.dtype}, which is no weight without a scale"
    return "" if np.isfinite(array.astype(np.float32)).all() else "holds values that are not finite"


def refuse_misfits(where: str, model: str, phrases: Iterable[str]) -> None:
    """UserError naming the first few of `phrases`, if there are any."""
    phrases = list(phrases)
    if phrases:
        more = f"; and {len(phrases) - 5} more" if len(phrases) > 5 else ""
        raise UserError(f"{where}: does not fit '{model}': {'; '.join(phrases[:5])}{more}")
