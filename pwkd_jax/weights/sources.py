"""Files of weights of any project, by their form: {name: array}, whatever the names are.

A .safetensors or .npz file, the directory of an Orbax checkpoint, and otherwise a PyTorch checkpoint.
"""

import fnmatch
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.weights import files, orbax, pytorch, trees


def read(path: Path, key: str = "") -> tuple[dict[str, np.ndarray], str]:
    """({name: array}, SHA-256 of the file, or of the arrays of a directory).

    key: which network of several, see `pytorch.choose` and `trees.chosen`. Raises UserError.
    """
    if storage.is_folder(path):
        found = orbax.read(path)
    elif path.suffix == ".npz":
        found = _npz(path)
    elif path.suffix == ".safetensors":
        found, metadata = files.tensors(path)
        if metadata.get("format") == "pwkd_jax":
            raise UserError(f"{path}: is a file of this project already, and needs no conversion")
    else:
        return pytorch.read(path, key), _digest(path)
    digest = _digest(path, found)
    found = trees.plain(found)
    if trees.own(found):
        found = trees.chosen(str(path), found, key)
    else:
        found = pytorch.named(path, pytorch.choose(path, {"": found}, key), key)
    return found, digest


def _npz(path: Path) -> dict[str, np.ndarray]:
    files.refuse_missing(path)
    try:
        content = storage.read_bytes(path)
        if not content.startswith(b"PK"):  # NumPy takes whatever it does not know for a pickle
            raise ValueError
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except UserError:  # of a bucket that does not answer
        raise
    except Exception as e:  # zipfile, zlib and NumPy's reader of headers raise of everything
        if "allow_pickle" in str(e):
            raise UserError(
                f"{path}: holds Python objects besides arrays, which could run code; it was not loaded; save "
                "arrays by name, as numpy.savez(file, **arrays) does"
            ) from e
        raise UserError(f"{path}: is not a whole .npz file; save it with numpy.savez") from e
    for name, array in found.items():
        if array.dtype.kind == "V":  # NumPy writes what it has no name for, such as bfloat16, as bytes alone
            raise UserError(f"{path}: holds {name} as bytes without a type, as NumPy keeps bfloat16; save it as float32")
    return found


def without(path: Path, found: dict[str, np.ndarray], ignore: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a file but for those of the patterns (shell style) `ignore`. Raises UserError for a pattern of nothing."""
    for pattern in ignore:
        if not (dropped := fnmatch.filter(found, pattern)):
            raise UserError(f"--ignore: '{pattern}' is the name of nothing in {path}")
        found = {name: array for name, array in found.items() if name not in dropped}
    return found


def _digest(path: Path, found: dict[str, np.ndarray] | None = None) -> str:
    if found is None or not storage.is_folder(path):
        with storage.opened(path) as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    whole = hashlib.sha256()
    for name, array in sorted(found.items()):
        whole.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return whole.hexdigest()
