"""PyTorch weights: read without running anything of theirs, and translated to this project's names and layouts and back.

`names` says what each module of a model is called elsewhere. Convolution kernels turn from [out, in, h, w] to
[h, w, in, out], matrices from [out, in] to [in, out]; batch norm's weight is `scale`, its running mean and variance
statistics. A transformer's joint projection [3 * D, D] is cut into query, key and value, which some projects keep apart, and
each into heads.
"""

import math
import re
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import models, storage, weights
from pwkd_jax.errors import UserError
from pwkd_jax.weights import files, names

JOINT = ("query", "key", "value")
# Of several networks in one file, these are meant first: averaged weights are what a training script reports, and of a pair
# it is the student that was trained.
FIRST = ("ema", "averaged", "student")
SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt")


def read(path: Path, key: str = "") -> dict[str, np.ndarray]:
    """{name: array} of a PyTorch checkpoint (.pth, .pt, .tar, .bin).

    key: which network of several, as in state_dict_ema, or what its names begin with, as in teacher. Where it is not given, the
    first of FIRST is taken, and said on standard error.

    Of a checkpoint, only tensors and plain containers are read; a pickle that asks for anything else is refused before it
    is run. Raises UserError for that, for a torn or missing file, and where PyTorch is needed but not installed.
    """
    files.refuse_missing(path)
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading PyTorch checkpoints needs PyTorch (pip install torch); .safetensors and .npz files do not"
        ) from None
    import pickle
    import warnings

    # Accuracies that training scripts keep beside the weights are often numpy's numbers, which hold nothing but a number.
    scalar, numbers = np.float64(0).__reduce__()[0], (np.float32, np.float64, np.int64)
    harmless = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *(type(np.dtype(n)) for n in numbers)]
    try:
        # weights_only: an unpickler that knows tensors and containers, and refuses every other name.
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")
            source = path if isinstance(path, Path) else storage.opened(path)
            content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e)
        if "Unsupported" in reason or "GLOBAL" in reason:
            raise UserError(
                f"{path}: holds Python objects besides tensors, which could run code; it was not loaded; where you trust it, "
                "keep the tensors alone with PyTorch: torch.save(model.state_dict(), 'weights.pth')"
            ) from e
        raise UserError(f"{path}: is not a whole PyTorch checkpoint") from e
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{path}: is not a whole PyTorch checkpoint") from e
    networks = state_dicts(content, torch.Tensor)
    if not networks:
        raise UserError(f"{path}: holds no state dict, neither by itself nor in a dictionary of it")
    found = named(path, choose(path, networks, key), key)
    try:
        found = {name: tensor.detach() for name, tensor in found.items()}
        return {name: _array(tensor, torch) for name, tensor in found.items()}
    except (TypeError, RuntimeError) as e:
        raise UserError(f"{path}: holds tensors that are not plain arrays, such as sparse or quantised ones") from e


def _array(tensor, torch) -> np.ndarray:
    """A tensor as an array, those of 8 bits as such, which `refuse_narrow` then names."""
    if not tensor.is_floating_point():
        return tensor.numpy()
    if tensor.element_size() > 1:
        return tensor.to(torch.float32).numpy()  # NumPy has no bfloat16
    kind = getattr(ml_dtypes, str(tensor.dtype).removeprefix("torch."), None)
    if kind is None:
        raise TypeError
    return tensor.contiguous().view(torch.uint8).numpy().view(kind)


def state_dicts(content: Any, kind: type, place: str = "") -> dict[str, dict]:
    """{where: {name: tensor}} of every state dict in a checkpoint, "" being the checkpoint itself. kind: of a tensor."""
    if not isinstance(content, dict):
        return {}
    # Some scripts put an epoch among the tensors; of names with a dot, all have to be tensors.
    tensors = {key: value for key, value in content.items() if isinstance(value, kind)}
    if any("." in str(key) for key in tensors) and all(key in tensors for key in content if "." in str(key)):
        return {place: tensors}
    found: dict[str, dict] = {}
    for key, value in content.items():
        if key != "optimizer":  # its state holds tensors of other kinds
            found |= state_dicts(value, kind, f"{place}.{key}".strip("."))
    return found


def _rank(place: str) -> int:
    words = re.findall("[a-z]+", place.lower())
    return next((i for i, word in enumerate(FIRST) if word in words), len(FIRST))


def choose(path: Path, networks: dict[str, dict], key: str = "") -> dict:
    """The state dict that `key` names among {where: state dict}, or the first of FIRST; what was chosen is said where there are
    several. Raises UserError for a `key` that names none."""
    if key in networks:
        return networks[key]
    inside = [where for where, found in networks.items() if any(name.startswith(f"{key.rstrip('.')}.") for name in found)]
    if key and not inside:
        raise UserError(f"--key: {path} holds no '{key}'; there are {', '.join(repr(n) for n in networks)}")
    places = inside if key else list(networks)
    chosen = min(places, key=_rank)
    if len(networks) > 1 and not key:
        others = ", ".join(f"--key={place}" for place in places if place != chosen)
        print(f"note: {path} holds several networks; '{chosen}' was taken, others are {others}", file=sys.stderr)
    return networks[chosen]


def named(path: Path, found: dict, key: str) -> dict:
    """Of a state dict that holds several networks side by side, the names of the one meant: of `key`, or of the student."""
    heads = {name.split(".")[0] for name in found}
    if key and any(name.startswith(f"{key.rstrip('.')}.") for name in found):
        return {name: x for name, x in found.items() if name.startswith(f"{key.rstrip('.')}.")}
    for head in ("", "module.", "model."):
        pair = [f"{head}student.", f"{head}teacher."]
        if all(any(name.startswith(p) for name in found) for p in pair) and len(heads) <= 2:
            print(f"note: {path} holds a student and a teacher; the student was taken, the other is --key={pair[1][:-1]}",
                  file=sys.stderr)  # fmt: skip
            return {name: x for name, x in found.items() if not name.startswith(pair[1])}
    return found


def refuse_narrow(where: str, found: dict[str, np.ndarray]) -> None:
    """UserError naming the first tensor of 8-bit floats."""
    narrow = [name for name, x in found.items() if x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.floating)]
    if narrow:
        more = f" and {len(narrow) - 1} more such tensors" if len(narrow) > 1 else ""
        raise UserError(
            f"{where}: holds {narrow[0]} as {found[narrow[0]].dtype}{more}; floats of 8 bits are weights only together with "
            "scales, which this does not know, so save the network as float32, float16 or bfloat16"
        )


def classes(model: nn.Module, found: dict[str, np.ndarray]) -> int | None:
    """The number of classes that a file's classifier has, or None where it has none of the model's names."""
    heads = [head for project in names.PROJECTS for head in project(model, "classifier")]
    biases = (names.found_as(f"{head}.bias", found) for head in heads)
    return next((found[bias].shape[0] for bias in biases if bias and found[bias].ndim), None)


def to_flax(where: str, name: str, model: nn.Module, image_shape: tuple[int, ...], found: dict[str, np.ndarray]) -> dict:
    """Variables of `model` (called `name` in messages) from a file's tensors, by the names of the project that fits them best.

    Raises UserError listing every tensor that is missing, of another shape, or left over, all but those of `names.LEFT_OUT`.
    """
    found = {key: x for key, x in found.items() if not names.left_out(key)}
    like = flatten_dict(models.abstract(model, image_shape))
    project = names.project(model, like, found)
    wanted = {path: names.keys(project, model, path) for path in like}
    prefix = names.prefix(wanted.values(), found)
    result, used, phrases = {}, set(), []
    for path, keys in wanted.items():
        key = next((as_ for key in keys if (as_ := names.found_as(key, found, prefix))), None)
        if key is None:
            phrases.append(f"{prefix}{' or '.join(keys)} is not in it")
            continue
        used.add(key)
        joint = _joint(path, wanted)
        array, shape = found[key], _torch_shape(path, like[path].shape, joint)
        if array.shape != shape:
            phrases.append(f"{key} is {list(array.shape)}, not {list(shape)}")
        elif bad := weights.unusable(array):
            phrases.append(f"{key} {bad}")
        else:
            result[path] = _from_torch(path, array, like[path].shape, joint)
    left = sorted(found.keys() - used)
    names.refuse_unfit(where, name, left)
    phrases += [f"{key} is not wanted" for key in left]
    weights.refuse_misfits(where, name, dict.fromkeys(phrases))
    return unflatten_dict(result)


def to_torch(model: nn.Module, variables: dict) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`: {name in the first of the model's reference projects: array}."""
    flat = flatten_dict(jax.device_get(variables))
    named = {path: names.keys(names.reference, model, path) for path in flat}
    result: dict[str, np.ndarray] = {}
    for path, array in flat.items():
        key = named[path][0]
        if not _joint(path, named):
            result[key] = _to_torch(path, np.asarray(array))
        elif path[-2] == "query":
            parts = [np.asarray(flat[(*path[:-2], part, path[-1])]) for part in JOINT]
            result[key] = np.concatenate([_to_torch(path, part) for part in parts])
    return {key: np.ascontiguousarray(array) for key, array in result.items()}


def _projection(path: tuple[str, ...]) -> bool:
    return len(path) > 3 and path[-3] == "attention" and path[-2] in JOINT


def _joint(path: tuple[str, ...], named: dict[tuple[str, ...], tuple[str, ...]]) -> bool:
    """Whether query, key and value are one array where they are called so."""
    return _projection(path) and len({named[(*path[:-2], part, path[-1])] for part in JOINT}) == 1


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...], joint: bool) -> tuple[int, ...]:
    """The shape in PyTorch of an array that has `shape` here. joint: with query, key and value in one."""
    if _projection(path):
        width = math.prod(shape[-2:])
        out = 3 * width if joint else width
        return (out, shape[0]) if path[-1] == "kernel" else (out,)
    if path[-1] != "kernel":
        return shape
    if path[-3:-1] == ("attention", "out"):
        shape = (math.prod(shape[:2]), shape[2])
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _from_torch(path: tuple[str, ...], array: np.ndarray, shape: tuple[int, ...], joint: bool) -> np.ndarray:
    if joint:
        array = np.split(array, 3)[JOINT.index(path[-2])]
    if path[-1] == "kernel":
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array.reshape(shape), np.float32)


def _to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return array.reshape(-1) if _projection(path) else array
    if _projection(path):
        return array.reshape(array.shape[0], -1).T
    if path[-3:-1] == ("attention", "out"):
        array = array.reshape(-1, array.shape[-1])
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
