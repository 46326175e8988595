"""Trees of this project's own names, as Flax and Orbax keep them, found in a file whatever is around them.

An array is called `params/stage1_block1/conv1/kernel`, or without its collection as in a state of Flax NNX, there also with
`value` at its end; parts are joined by / or by dots. An index in a list, `layers/0/kernel`, is `layers_0/kernel`, as Linen
calls it. Names before these, such as `model` or `params`, are those that most arrays have.
"""

import collections
import re
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import models, weights
from pwkd_jax.errors import UserError

Path = tuple[str, ...]

# {what a name holds: why it is left out}; nothing of it is in a frozen network.
LEFT_OUT = {
    "opt_state": "the optimiser's",
    "optimizer": "the optimiser's",
    "step": "a counter",
    "rngs": "the state of random numbers",
}


def split(name: str) -> Path:
    """A file's name in its parts, an index joined to the part before."""
    parts: list[str] = []
    for part in re.split(r"[/.]", name):
        if part.isdigit() and parts:
            parts[-1] += f"_{part}"
        else:
            parts.append(part)
    return tuple(parts)


def plain(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the `value` that ends every name in a state of Flax NNX, where it does."""
    if not any(re.search(r"[/.]kernel[/.]value$", name) for name in found):
        return found
    return {re.sub(r"[/.]value$", "", name): array for name, array in found.items()}


def own(found: Mapping[str, Any]) -> bool:
    """Whether a file has Flax's names: PyTorch calls no array `kernel`."""
    return any(split(name)[-1] == "kernel" for name in found)


def chosen(where: str, found: dict[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    """What lies in the part `key` of a tree, and the batch statistics beside it where that has none. Raises UserError."""
    if not key:
        return found
    inner = tuple(re.split(r"[/.]", key.strip("/.")))
    paths = {name: tuple(re.split(r"[/.]", name)) for name in found}
    inside = {"/".join(path[len(inner) :]): found[name] for name, path in paths.items() if path[: len(inner)] == inner}
    if not inside:
        raise UserError(f"--key: {where} holds no '{key}'; there are {', '.join(sorted({p[0] for p in paths.values()}))}")
    if any("batch_stats" in split(name) for name in inside):
        return inside
    beside = (*inner[:-1], "batch_stats")
    return inside | {
        "/".join(path[len(inner) - 1 :]): found[name] for name, path in paths.items() if path[: len(inner)] == beside
    }


def left_out(name: str) -> str | None:
    """What of LEFT_OUT a name holds, or None."""
    parts = [re.sub(r"_\d+$|^.*__", "", part) for part in split(name)]
    return next((word for word in LEFT_OUT if word in (parts[-1:] if word == "step" else parts)), None)


def say_left_out(where: str, found: Mapping[str, Any]) -> None:
    """On standard error what is left out of a tree, and why."""
    count = collections.Counter(word for name in found if (word := left_out(name)))
    if count:
        said = ", ".join(f"{number} of {word} ({LEFT_OUT[word]})" for word, number in count.items())
        print(f"note: {where} holds arrays that are left out: {said}", file=sys.stderr)


def classes(model: nn.Module, other: nn.Module, image_shape: tuple[int, ...], found: Mapping[str, np.ndarray]) -> int | None:
    """The number of classes that a file's classifier has, or None where it has none. other: the model of one class more."""
    a, b = (flatten_dict(models.abstract(one, image_shape)) for one in (model, other))
    for path in a:
        axis = next((i for i, (x, y) in enumerate(zip(a[path].shape, b[path].shape, strict=True)) if x != y), None)
        named = [name for name in found if not left_out(name) and split(name)[-len(path) + 1 :] == path[1:]]
        if axis is not None and named and found[named[0]].ndim == len(a[path].shape):
            return found[named[0]].shape[axis]
    return None


def to_flax(where: str, name: str, model: nn.Module, image_shape: tuple[int, ...], found: dict[str, np.ndarray]) -> dict:
    """Variables of `model` (called `name` in messages) from a file's arrays. Raises UserError listing every array that is
    missing, of another shape, or left over, all but those of LEFT_OUT."""
    like = flatten_dict(models.abstract(model, image_shape))
    named = {split(key): key for key in found if not left_out(key)}
    if len(named) < len([key for key in found if not left_out(key)]):
        twice = next(key for key in found if not left_out(key) and named[split(key)] != key)
        raise UserError(f"{where}: holds {twice} twice, also as {named[split(twice)]}; it should have one of them")
    # Of the names that end as an array's here, with its collection or without, what stands before.
    before: collections.Counter[Path] = collections.Counter()
    for path in named:
        for ending in (path[-n:] for n in range(1, len(path) + 1)):
            if ending in like or any((collection, *ending) in like for collection in ("params", "batch_stats")):
                before[path[: len(path) - len(ending)]] += 1
    prefix = max(before, key=lambda path: (before[path], -len(path)), default=())
    result = {}
    for path, wanted in like.items():
        key = next((named[p] for p in ((*prefix, *path), path, (*prefix, *path[1:]), path[1:]) if p in named), None)
        if key is not None:
            array = found[key]
            floats = jnp.issubdtype(array.dtype, jnp.floating) and jnp.issubdtype(wanted.dtype, jnp.floating)
            named.pop(split(key))
            result["/".join(path)] = array.astype(np.float32) if floats and array.dtype.itemsize > 1 else array
    phrases = weights.mismatches(result, {"/".join(path): x for path, x in like.items()})
    phrases += [f"{key} is not wanted" for key in sorted(named.values())]
    weights.refuse_misfits(where, name, phrases)
    return unflatten_dict({tuple(path.split("/")): x for path, x in result.items()})
