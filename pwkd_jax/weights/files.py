"""Safetensors files as bytes: the same arrays and texts always give the same bytes, and a bit that was flipped is seen.

A file is 8 bytes of the header's length, the header (JSON: each tensor's type, shape and place, and texts under
`__metadata__`), and the tensors. Files that `pack` made have one text more, a SHA-256 of the whole file in which its own 64
digits count as zeros. Files without one, of others or of older versions, are read as they are.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from pwkd_jax import storage
from pwkd_jax.errors import UserError

# Both the name and the value say what it is: one flipped bit leaves one of them, so that it cannot pass for a file without.
CHECKSUM, MARK, UNKNOWN = "pwkd_jax_checksum", "pwkd_jax sha256 ", "0" * 64
TYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "U64": "u8", "I32": "i4", "U32": "u4", "I16": "i2", "U16": "u2",
        "I8": "i1", "U8": "u1", "BOOL": "?", "C64": "c8", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}  # fmt: skip


def pack(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file of contiguous arrays, named texts, and their checksum."""
    # The library keeps texts in an order that changes from process to process; so they are put in here.
    bare = safetensors.numpy.save(dict(arrays))
    size = int.from_bytes(bare[:8], "little")
    texts = {key: metadata[key] for key in sorted(metadata)} | {CHECKSUM: MARK + UNKNOWN}
    header = json.dumps({"__metadata__": texts} | json.loads(bare[8 : 8 + size]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    content = len(header).to_bytes(8, "little") + header + bare[8 + size :]
    at = content.index((MARK + UNKNOWN).encode()) + len(MARK)
    return content[:at] + _digest(content, at).encode() + content[at + len(UNKNOWN) :]


def tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, texts) of any safetensors file. Raises UserError for one that is missing, torn, changed since `pack` made it,
    or of a type that NumPy cannot hold."""
    refuse_missing(path)
    try:
        content = storage.read_bytes(path)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        metadata = header.pop("__metadata__", {})
        refuse_change(path, content, metadata)
        odd = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in TYPES}
        if odd:
            name, kind = next(iter(odd.items()))
            more = f", and {len(odd) - 1} more such tensors" if len(odd) > 1 else ""
            raise UserError(
                f"{path}: holds {name} as {kind}{more}, a type of numbers that NumPy has not; save its tensors as float32 first"
            )
        views = dict(safetensors.deserialize(content))  # in an order of its own; the header's is the same each time
        found = {
            name: np.frombuffer(views[name]["data"], TYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
        }
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as e:
        reason = re.sub(r"^Error while deserializing header: |^Error while deserializing: ", "", str(e))
        raise UserError(f"{path}: is not a whole safetensors file ({reason})") from e
    return found, metadata


def refuse_change(path: Path, content: bytes, metadata: Mapping[str, str]) -> None:
    """UserError where a file's checksum is not that of its content; nothing where it has none."""
    if CHECKSUM not in metadata and not any(MARK in text for text in metadata.values()):
        return
    given = metadata.get(CHECKSUM, "").removeprefix(MARK)
    at = content.find((MARK + given).encode()) + len(MARK)
    if not re.fullmatch("[0-9a-f]{64}", given) or at < len(MARK) or _digest(content, at) != given:
        raise UserError(
            f"{path}: is not what was written, by its own checksum, so it was cut short, damaged or edited; copy it again or "
            "make it anew"
        )


def refuse_missing(path: Path) -> None:
    """UserError unless `path` is a file."""
    if not storage.is_file(path):
        raise UserError(f"{path}: {'is a directory' if storage.is_folder(path) else 'there is no such file'}")


def _digest(content: bytes, at: int) -> str:
    """SHA-256 of `content`, the 64 bytes from `at` counted as zeros."""
    view, whole = memoryview(content), hashlib.sha256()
    for part in (view[:at], UNKNOWN.encode(), view[at + len(UNKNOWN) :]):
        whole.update(part)
    return whole.hexdigest()
