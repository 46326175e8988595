"""An exported program read again, of StableHLO or ONNX: this project's, whole and of a version that is known here, or one
sentence."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import loading
from pwkd_jax.weights import files


class Program(NamedTuple):
    """log_probabilities(uint8 images [B, H, W, C]) -> [B, classes], asynchronous; data: what its card names, as a config has
    them."""

    log_probabilities: Callable
    platforms: tuple[str, ...]
    image_shape: tuple[int, ...]
    num_classes: int
    data: dict


def open_program(path: Path) -> Program:
    """The program in `path` (FILE.stablehlo) and what its card beside it says. Raises UserError for one that is missing,
    damaged or foreign, or that was exported for other platforms or by a JAX whose programs this one cannot read."""
    content, card, data = _content(path, "program")
    with _readable(path, content, card):
        program = jax_export.deserialize(bytearray(content))
        inputs, outputs, platforms = program.in_avals, program.out_avals, program.platforms
    if not _is_classifier(inputs, outputs) or program.nr_devices != 1:
        takes, gives = (", ".join(map(str, avals)) or "nothing" for avals in (inputs, outputs))
        raise UserError(f"{path}: takes {takes} and gives {gives}, on {program.nr_devices} devices; a program of this project "
                        "takes uint8[batch,H,W,C] and gives float32[batch,classes] on one")  # fmt: skip
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in platforms:
        raise UserError(f"{path}: was exported for {', '.join(platforms)}, and this is {platform}")
    # Probabilities under float32's smallest count as that: a program has no logits to tell them apart.
    run = jax.jit(lambda x: jnp.log(jnp.maximum(program.call(x), jnp.finfo(jnp.float32).tiny)))
    image_shape, compiled = inputs[0].shape[1:], {}
    with _readable(path, content, card):
        run.lower(jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8))

    def log_probabilities(images: jax.Array) -> jax.Array:
        # Operations that this JAX reads but has no code for are found as it is compiled.
        if images.shape not in compiled:
            with _readable(path, content, card):
                compiled[images.shape] = run.lower(images).compile()
        return compiled[images.shape](images)

    return Program(log_probabilities, platforms, image_shape, outputs[0].shape[1], data)


def open_onnx(path: Path) -> Program:
    """The same of FILE.onnx, by onnxruntime on this machine's processors. Raises UserError."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError(f"{path}: needs the package onnxruntime, which is not installed: pip install onnxruntime")
    import onnxruntime

    content, _, data = _content(path, "onnx")
    try:
        with _quiet():
            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has no class of its own for what it raises
        reason = str(e).partition("\n")[0][:100]
        raise UserError(f"{path}: is not a whole ONNX model for onnxruntime {onnxruntime.__version__} ({reason})") from e
    (takes, *more), (gives, *others) = session.get_inputs(), session.get_outputs()
    (batch, *image), (_, *classes) = takes.shape or [0], gives.shape or [0]
    fixed = [isinstance(n, int) for n in (batch, *image, *classes)]
    if more or others or (takes.type, gives.type) != ("tensor(uint8)", "tensor(float)") or fixed != [False] + 4 * [True]:
        raise UserError(f"{path}: takes {takes.type} {takes.shape} and gives {gives.type} {gives.shape}; an ONNX model of this "
                        "project takes uint8 [batch, H, W, C] and gives float32 [batch, classes]")  # fmt: skip

    def log_probabilities(images: np.ndarray) -> np.ndarray:
        (found,) = session.run(None, {takes.name: np.asarray(images)})
        return np.log(np.maximum(found, np.finfo(np.float32).tiny))

    return Program(log_probabilities, ("onnxruntime",), tuple(image), classes[0], data)


def _content(path: Path, kind: str) -> tuple[bytes, dict, dict]:
    """(a file's bytes, what the card beside it says of it under `kind`, the data that the card names). Raises UserError."""
    files.refuse_missing(path)
    card, data = _card(path.with_suffix(".json"), kind)
    content = storage.read_bytes(path)
    if "sha256" in card and card["sha256"] != hashlib.sha256(content).hexdigest():
        raise UserError(
            f"{path}: is not the {kind} of {path.with_suffix('.json')}, by the checksum there, so one of them was damaged "
            "or exchanged; export it anew"
        )
    return content, card, data


def _card(path: Path, kind: str) -> tuple[dict, dict]:
    """(what a card says of the file of this kind, the data that it names); both empty where there is none."""
    try:
        card = json.loads(storage.read(path)) if storage.exists(path) else {"source": {}}
        if kind == "onnx" and "model" in card and kind not in card:
            raise UserError(f"{path}: is of an export without --onnx, and the .onnx beside it of another one; export it anew")
        return dict(card.get(kind, {})), loading.known(card["source"], card.get("classes", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: is no card of this project; remove it and name a data set with --data") from e


def _is_classifier(inputs: tuple, outputs: tuple) -> bool:
    """Whether abstract values are those of uint8 [batch, H, W, C] -> float32 [batch, classes], of any batch."""
    if [x.dtype for x in (*inputs, *outputs)] != [jnp.uint8, jnp.float32] or len(inputs) != 1:
        return False
    (batch, *image), (rows, *classes) = inputs[0].shape or (0,), outputs[0].shape or (0,)
    symbolic = not isinstance(batch, int) and batch == rows
    return symbolic and len(image) == 3 and len(classes) == 1 and all(isinstance(n, int) for n in (*image, *classes))


@contextlib.contextmanager
def _readable(path: Path, content: bytes, card: dict) -> Iterator[None]:
    """Turn what JAX raises of a program that it cannot read into a UserError. What MLIR prints of it meanwhile, straight to the
    process's standard error, is not shown."""
    try:
        with _quiet():
            yield
    except Exception as e:  # flatbuffers, MLIR and JAX raise of everything
        here, version = jax.__version__, card.get("jax")
        about = f"was exported by jax {version}" if version not in (None, here) else ""
        if version is None and isinstance(e, (jax.errors.JaxRuntimeError, NotImplementedError)):
            # Without its card, the bytes say only which StableHLO they are written for.
            form = re.search(rb"StableHLO_v(\d+\.\d+\.\d+)", content)
            about = "is damaged, or was exported by a newer jax"
            about += f" (for StableHLO {form[1].decode()} or later)" if form else ""
        if about:
            raise UserError(f"{path}: {about}, and jax {here} here cannot read it; use that one, or export it anew") from e
        reason = str(e).partition("\n")[0][:100]
        raise UserError(f"{path}: is not a whole exported program for jax {here} ({type(e).__name__}: {reason})") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that is printed within reaches file descriptor 2; Python's own sys.stderr is not used there."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
