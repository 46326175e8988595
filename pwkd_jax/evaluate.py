"""Scores of a trained model, an exported program or a converted file on any data set, alone or beside its teacher.

    python -m pwkd_jax.evaluate runs/digits/students/pwkd/seed0 --teacher runs/digits/teacher/slimmable
    python -m pwkd_jax.evaluate resnet32x4.safetensors --data cifar100 --data-dir /my/tfds
    python -m pwkd_jax.evaluate exported/model.stablehlo --data digits --json
    python -m pwkd_jax.evaluate resnet50.safetensors --data folder --data-dir /my/photos --split validation

Images of many sizes are streamed: shorter side to --resize pixels, then the central --image-size.

Prints top-1, top-5, negative log-likelihood, calibration error, images a second and, with --teacher, agreement (how often both
choose one class) and divergence, the mean KL(teacher || student). Exits with code 2 and one sentence on a mistake.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import export as jax_export

from pwkd_jax import data, scores, trained, weights
from pwkd_jax.errors import UserError
from pwkd_jax.training import sharding

KINDS = f"{trained.KINDS}, or an exported .stablehlo program"


class Scored(NamedTuple):
    """log_probabilities(uint8 images) -> [B, classes], asynchronous; devices: how many share a batch."""

    log_probabilities: Callable
    title: str
    image_shape: tuple[int, ...]
    num_classes: int
    data: dict
    devices: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pwkd_jax.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("target", help=KINDS)
    parser.add_argument("--width", type=float, help="of a slimmable teacher; its widest by default")
    parser.add_argument("--teacher", help="another of the same kinds, to compare with")
    parser.add_argument("--teacher-width", type=float)
    parser.add_argument("--data", help="digits, folder or a TFDS name; by default what it was trained on")
    parser.add_argument("--data-dir", help="where TFDS sets lie, or the folder")
    parser.add_argument("--split", help="as in test or validation[:1000]; by default the experiment's test split, or test")
    parser.add_argument("--image-size", type=int, help="0: images of one size, in RAM; by default as it was trained, or what "
                        "the model takes where the data set has images of many sizes")  # fmt: skip
    parser.add_argument("--resize", type=int, help="by default as it was trained, or 8/7 of the image size")
    parser.add_argument("--workers", type=int, default=-1, help="processes that decode streamed images; -1: one a core")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--model", default="", help="module:Name, where a file's model is your own")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)  # TFDS and Orbax warn of things that a user here cannot act on
    try:
        result = evaluate(**{key: value for key, value in vars(options).items() if key != "json"})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if options.json else text(result))
    return 0


def evaluate(
    target: str, width: float | None = None, teacher: str | None = None, teacher_width: float | None = None,
    data: str | None = None, data_dir: str | None = None, split: str | None = None, batch_size: int = 256, model: str = "",
    image_size: int | None = None, resize: int | None = None, workers: int = -1,
) -> dict:  # fmt: skip
    """{"target", "model", "data", "split", "images", "images_per_second", the keys of `scores.summary`, and with a teacher
    "teacher": {"target", "model", its own scores}}. Raises UserError."""
    if batch_size < 1:
        raise UserError(f"--batch-size: {batch_size} is not possible; it should be at least 1")
    if teacher_width is not None and teacher is None:
        raise UserError("--teacher-width: needs --teacher")
    own = _open(target, width, model)
    taught = _open(teacher, teacher_width, model) if teacher else None
    name, split = data or own.data["name"], split or (own.data["test_split"] if data is None else "test")
    if not name:
        raise UserError(f"--data: {target} does not say what it was trained on; name a data set")
    folder = data_dir if data_dir is not None else (own.data["data_dir"] if data is None else "")
    known = own.data if data is None else {}
    images = _split(name, folder, split, own, target, image_size, resize, workers, known)
    if taught and (taught.image_shape, taught.num_classes) != (own.image_shape, own.num_classes):
        raise UserError(f"--teacher: {teacher} {_takes(taught)}, but {target} {_takes(own)}")
    found, rate = _predict(own, images, batch_size)
    beside, _ = _predict(taught, images, batch_size) if taught else (None, 0)
    labels = images.labels
    for who, scored in ((target, found), (teacher, beside)):
        if scored is not None and (bad := int(np.isnan(scored).any(axis=1).sum())):
            raise UserError(f"{who}: gives no number for {bad} of {len(labels)} images; its weights are not finite")
    result = {"target": target, "model": own.title, "data": name, "split": split, "images": len(labels),
              "images_per_second": rate, **scores.summary(scores.per_image(found, labels, beside))}  # fmt: skip
    if taught:
        theirs = scores.summary(scores.per_image(beside, labels))
        result["teacher"] = {"target": teacher, "model": taught.title, **theirs}
    return result


def _split(
    name: str, folder: str, split: str, own: Scored, target: str, size: int | None, resize: int | None, workers: int,
    known: dict,
) -> data.Split | data.Stream:  # fmt: skip
    if size is None:
        size = known.get("image_size")
    if size is None:
        size = own.image_shape[0] if data.many_sizes(name, folder) else 0
    if size < 0 or workers < -1:
        raise UserError("--image-size and --workers: take 0 or more, and --workers also -1 for one a core")
    streaming = None
    if size:
        resize = resize or known.get("resize") or round(size * 8 / 7)
        if resize < size:
            raise UserError(f"--resize: {resize} pixels are fewer than the {size} that are cropped from them")
        streaming = data.Streaming(size, resize=resize, workers=workers)
    images, classes = data.load_split(name, folder, split, streaming=streaming)
    if tuple(images.image_shape) != tuple(own.image_shape) or classes != own.num_classes:
        size = "x".join(map(str, images.image_shape))
        raise UserError(f"--data: '{name}' has {size} images in {classes} classes, but {target} {_takes(own)}")
    return images


def _takes(scored: Scored) -> str:
    return f"takes {'x'.join(map(str, scored.image_shape))} images and knows {scored.num_classes} classes"


def _open(target: str, width: float | None, model: str) -> Scored:
    if Path(target).suffix == ".stablehlo":
        for option, value in (("--width", width), ("--model", model)):
            if value:
                raise UserError(f"{option}: {target} is a program, of one model and width")
        return _open_program(Path(target))
    found = trained.load(target, width, model, KINDS)
    mesh = sharding.make_mesh()
    variables = jax.device_put(found.variables, sharding.replicated(mesh))
    run = jax.jit(lambda v, x: jax.nn.log_softmax(found.logits(v, x).astype(jnp.float32)))
    card = found.card
    title = f"{card['model']}" + (f" at width {card['width']:g}" if card["width"] != 1 else "")
    title += f", {card['parameters']:,} parameters, {card['macs']:,} MACs an image"

    def log_probabilities(images: np.ndarray) -> jax.Array:
        return run(variables, sharding.put_batch(mesh, {"image": images})["image"])

    return Scored(log_probabilities, title, tuple(card["image_shape"]), card["num_classes"], found.data, mesh.size)


def _open_program(path: Path) -> Scored:
    weights.refuse_missing(path)
    try:
        program = jax_export.deserialize(bytearray(path.read_bytes()))
        (images,), (out,) = program.in_avals, program.out_avals
    except Exception as e:  # flatbuffers and MLIR raise of everything
        raise UserError(f"{path}: is not a whole exported program") from e
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in program.platforms:
        raise UserError(f"{path}: was exported for {', '.join(program.platforms)}, and this is {platform}")
    # Probabilities under float32's smallest count as that: a program has no logits to tell them apart.
    run = jax.jit(lambda x: jnp.log(jnp.maximum(program.call(x), jnp.finfo(jnp.float32).tiny)))
    card = path.with_suffix(".json")
    try:
        known = trained.known(json.loads(card.read_text())["source"] if card.exists() else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{card}: is no card of this project; remove it and name a data set with --data") from e
    return Scored(run, f"a program for {', '.join(program.platforms)}", images.shape[1:], out.shape[1], known, 1)


def _predict(scored: Scored, split: data.Split, batch_size: int) -> tuple[np.ndarray, float]:
    """(log-probabilities [N, classes], images a second without the first batch, whose program has to be compiled)."""
    batch_size = -(-min(batch_size, len(split)) // scored.devices) * scored.devices
    batches = (b["image"] for b in data.eval_batches(split, batch_size))
    first = next(batches)
    jax.block_until_ready(scored.log_probabilities(first))
    begun = time.perf_counter()
    results = [scored.log_probabilities(b) for b in itertools.chain([first], batches)]
    jax.block_until_ready(results)
    rate = len(results) * batch_size / (time.perf_counter() - begun)
    return np.concatenate([np.asarray(r) for r in results])[: len(split)], rate


def text(result: dict) -> str:
    """The result in lines."""
    rows = [
        ("top-1", f"{result['top1']:.2f} %", ""),
        ("top-5", f"{result['top5']:.2f} %", ""),
        ("NLL", f"{result['nll']:.4f} nats", ""),
        ("calibration error", f"{result['calibration_error']:.2f} %", f"{scores.BINS} bins"),
    ]
    if teacher := result.get("teacher"):
        rows += [
            ("agreement", f"{result['agreement']:.2f} %", f"with {teacher['target']}, top-1 {teacher['top1']:.2f} %"),
            ("divergence", f"{result['divergence']:.4f} nats", "mean KL(teacher || student)"),
        ]
    rows.append(("images a second", f"{result['images_per_second']:,.0f}", "after the first batch"))
    lines = [f"{result['target']}: {result['model']}", f"{result['data']}, {result['split']}: {result['images']} images"]
    return "\n".join(lines + [f"  {name:<18}{value:>14}  {note}".rstrip() for name, value, note in rows])


if __name__ == "__main__":
    sys.exit(main())
