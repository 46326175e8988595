"""Safetensors files as bytes: equal ones for equal arrays, checksums, and types that NumPy has not."""

import hashlib
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from pwkd_jax import convert
from pwkd_jax.errors import UserError
from pwkd_jax.weights import files

ARRAYS = {
    "params/b/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "params/a": np.float16([1.5]),
    "scalar": np.asarray(2.0, np.float64),
    "none": np.zeros((0, 3), np.float32),
}
TEXTS = {"format": "pwkd_jax", "card": json.dumps({"model": "m", "width": 1.0})}


def raw(entries: dict[str, tuple[str, list[int], bytes]], **texts: str) -> bytes:
    """A safetensors file written by hand, from its specification: {name: (type, shape, bytes)}."""
    header, at = {"__metadata__": texts} if texts else {}, 0
    for name, (kind, shape, content) in entries.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(content for _, _, content in entries.values())


def test_other_programs_read_what_is_written(tmp_path):
    content = files.pack(ARRAYS, TEXTS)
    (tmp_path / "w.safetensors").write_bytes(content)
    with safetensors.safe_open(tmp_path / "w.safetensors", "numpy") as file:
        theirs, metadata = {key: file.get_tensor(key) for key in ARRAYS}, file.metadata()
    ours, texts = files.tensors(tmp_path / "w.safetensors")
    for key, value in ARRAYS.items():
        for found in (ours[key], theirs[key]):
            assert found.dtype == value.dtype and found.shape == value.shape
            np.testing.assert_array_equal(found, value)
    assert metadata == texts and TEXTS.items() <= texts.items()
    # Tensors begin at a multiple of 8 bytes, as the format asks for.
    assert (8 + struct.unpack("<Q", content[:8])[0]) % 8 == 0


def test_the_checksum_is_sha256_of_all_but_itself():
    content = files.pack(ARRAYS, TEXTS)
    (digits,) = re.findall(rb'"pwkd_jax_checksum":"pwkd_jax sha256 ([0-9a-f]{64})"', content)
    assert hashlib.sha256(content.replace(digits, b"0" * 64)).hexdigest().encode() == digits


def test_any_flipped_bit_is_seen(tmp_path):
    content, path = files.pack(ARRAYS, TEXTS), tmp_path / "w.safetensors"
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"w\.safetensors: is not (a whole safetensors file|what was written)") as e:
            files.tensors(path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("change", ["cut", "longer", "zeros", "other checksum"])
def test_larger_changes_are_seen(change, tmp_path):
    content, path = files.pack(ARRAYS, TEXTS), tmp_path / "w.safetensors"
    other = re.search(rb"sha256 ([0-9a-f]{64})", files.pack(ARRAYS | {"scalar": np.zeros(())}, TEXTS))[1]
    path.write_bytes({
        "cut": content[:-1], "longer": content + b"0", "zeros": content[:-16] + bytes(16),
        "other checksum": re.sub(rb"[0-9a-f]{64}", other, content, count=1),
    }[change])  # fmt: skip
    with pytest.raises(UserError, match=r"w\.safetensors: is not what was written, by its own checksum, .* make it anew"):
        files.tensors(path)


@pytest.mark.parametrize("texts", [{}, {"format": "pt"}, {"format": "pwkd_jax", "card": "{}", "sha256": "0" * 64}])
def test_files_without_our_checksum_are_read(texts, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(raw({"x": ("F32", [2], struct.pack("<2f", 1, -2))}, **texts))
    found, metadata = files.tensors(tmp_path / "w.safetensors")
    assert found["x"].tolist() == [1, -2] and metadata == texts


def test_the_same_arrays_give_the_same_bytes_in_any_process():
    code = (
        f"import hashlib, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_files import *; "
        "print(hashlib.sha256(files.pack(ARRAYS, TEXTS)).hexdigest())"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    backwards = files.pack(dict(reversed(ARRAYS.items())), dict(reversed(TEXTS.items())))
    assert {hashlib.sha256(files.pack(ARRAYS, TEXTS)).hexdigest() for _ in range(9)} == {again}
    assert hashlib.sha256(backwards).hexdigest() == again


@pytest.mark.parametrize(
    "kind, one, name",
    [("F8_E4M3", b"\x38", "float8_e4m3fn"), ("F8_E5M2", b"\x3c", "float8_e5m2"), ("F8_E8M0", b"\x7f", "float8_e8m0fnu")],
)
def test_floats_of_eight_bits_are_named(kind, one, name, tmp_path, capsys):
    path, command = tmp_path / "w.safetensors", ["--model=resnet8", f"--out={tmp_path / 'o.safetensors'}"]
    path.write_bytes(raw({"a": ("F32", [1], bytes(4)), "conv1.weight": (kind, [4, 2], one * 8), "fc": (kind, [], one)}))
    assert files.tensors(path)[0]["conv1.weight"].astype(np.float32).tolist() == [[1, 1]] * 4
    assert convert.main([str(path), *command]) == 2
    assert re.fullmatch(
        rf"error: \S+w\.safetensors: holds conv1\.weight as {name} and 1 more such tensors; .*float32, float16 or bfloat16\n",
        capsys.readouterr().err,
    )
    # What is left out may be anything.
    assert convert.main([str(path), *command, "--ignore=conv1.*", "--ignore=fc"]) == 2
    assert "there is no classifier among its 3 tensors" in capsys.readouterr().err


@pytest.mark.parametrize("kind, content", [("F4", bytes(216)), ("F6_E2M3", bytes(324)), ("F2_NEXT", bytes(9))])
def test_types_that_cannot_be_read_are_named(kind, content, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw({"fc.bias": ("F32", [10], bytes(40)), "conv1.weight": (kind, [16, 3, 3, 3], content)}))
    assert convert.main([str(path), "--model=resnet8", f"--out={tmp_path / 'o.safetensors'}"]) == 2
    text = capsys.readouterr().err
    assert re.fullmatch(rf"error: \S+w\.safetensors: holds conv1\.weight as {kind}, a type .* as float32 first\n", text), text


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2**63) + b"{}", raw({"x": ("F32", [2], b"")}),
     struct.pack("<Q", 9) + b'{"x": 12}', raw({"x": ("F32", [1], bytes(4))}).replace(b"F32", b"F\xff2"),
     struct.pack("<Q", 40000) + b"[" * 40000],
)  # fmt: skip
def test_what_is_no_safetensors_file(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors: is not a whole safetensors file") as e:
        files.tensors(tmp_path / "w.safetensors")
    assert "\n" not in str(e.value)
