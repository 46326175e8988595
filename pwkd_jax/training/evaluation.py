"""Evaluation on a whole split, every image counted exactly once: while training, with the ensemble of snapshots, and after."""

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax import data, models, slimmable
from pwkd_jax.errors import UserError
from pwkd_jax.models import compute
from pwkd_jax.training import distributed, metrics, preemption, scores, sharding
from pwkd_jax.weights import Network


class Evaluator:
    """Scores models on one split; one compilation for each model, whatever the arm, seed or epoch.

    normalise: uint8 images [B, H, W, C] -> float32. `score(model, variables, batch)` -> (metrics, int32 [2, B]: each image's
    class, -1 of padding, and the one it is taken for) is the compiled program of a batch of `batch_size` images, the size asked
    for rounded up to whole devices.
    """

    def __init__(self, mesh, split: data.Split, batch_size: int, normalise: Callable):
        self._mesh, self._split = mesh, split
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

        def logits(model, variables, batch):
            with compute.layers():
                return models.apply(model, variables, normalise(batch["image"]), train=False)[0].logits

        def score(model, variables, batch):
            z = logits(model, variables, batch)
            values = {"top1": metrics.top1(z, batch["label"]), "loss": slimmable.cross_entropy(z, batch["label"])}
            classes = jnp.where(batch["mask"] > 0, batch["label"], -1), jnp.argmax(z, axis=-1)
            return metrics.collect(values, batch["mask"]), jnp.stack(classes).astype(jnp.int32)

        # Replicated, so that every process can read them.
        whole = {"static_argnums": 0, "out_shardings": sharding.replicated(mesh)}
        whole["compiler_options"] = compute.compiler_options(mesh.devices.flat[0].platform)
        self.score = jax.jit(score, **whole)
        self._softmax = jax.jit(lambda *args: jax.nn.softmax(logits(*args)), **whole)

    def on(self, split: data.Split) -> "Evaluator":
        """The same on another split, with the same compiled programs."""
        other = copy.copy(self)
        other._split = split
        return other

    def _batches(self):
        for batch in data.eval_batches(self._split, self.batch_size, jax.process_index(), jax.process_count()):
            preemption.check()
            yield sharding.put_batch(self._mesh, batch)

    def __call__(self, model, variables: dict) -> dict[str, float]:
        """{"top1": percent, "loss": mean cross entropy} of a model and its {"params", "batch_stats"}."""
        return metrics.mean(self.score(model, variables, batch)[0] for batch in self._batches())

    def predictions(self, model, variables: dict) -> tuple[np.ndarray, np.ndarray]:
        """(true classes, classes they are taken for), int [N]: by the program that scores, so that nothing more is compiled."""
        found = [self.score(model, variables, batch)[1] for batch in self._batches()]
        labels, predicted = np.concatenate([np.asarray(batch) for batch in found], axis=1)
        return labels[labels >= 0], predicted[labels >= 0]

    def ensemble_top1(self, snapshots: Sequence[tuple]) -> list[float]:
        """Top-1 in percent of the mean softmax of the last 1, 2, ... of `snapshots`: (model, variables), oldest first.

        Huang et al., Snapshot Ensembles, ICLR 2017.
        """
        total, result = np.zeros((), np.float32), []
        for model, variables in reversed(snapshots):
            probabilities = np.concatenate([np.asarray(self._softmax(model, variables, b)) for b in self._batches()])
            total = total + probabilities[: len(self._split.labels)]
            result.append(100.0 * int(np.sum(total.argmax(-1) == self._split.labels)) / len(self._split.labels))
        return result


def predictor(network: Network) -> tuple[Callable[[np.ndarray], jax.Array], int]:
    """(images [B, H, W, C] -> log-probabilities [B, classes], asynchronous; how many devices share a batch), on the devices of
    this process alone: each of several predicts the images that it read."""
    mesh = sharding.make_mesh(devices=jax.local_devices())
    variables = jax.device_put(network.variables, sharding.replicated(mesh))
    run = jax.jit(lambda v, x: jax.nn.log_softmax(network.logits(x, v).astype(jnp.float32)))
    return lambda images: run(variables, sharding.put_batch(mesh, {"image": images})["image"]), mesh.size


def score_predictions(
    log_probabilities: Callable, split: data.Split, *, teacher: Callable | None = None, batch_size: int = 256, devices: int = 1,
    names: tuple[str, str] = ("the network", "its teacher"), classes: bool = False,
) -> dict:  # fmt: skip
    """{"images", "images_per_second", the keys of `scores.summary`} of a predictor on a split, and beside a teacher's with
    "teacher": its own scores. Several processes share the images, call it all, and have the same result. classes: also
    "labels" and "predicted", and the teacher's "predicted": int [N], the class of each image and the one it is taken for.
    Raises UserError, by `names`, for one that gives no numbers."""
    found, labels, rate = _predict(log_probabilities, split, batch_size, devices)
    beside = _predict(teacher, split, batch_size, devices)[0] if teacher else None
    for who, predicted in zip(names, (found, beside), strict=True):
        if predicted is not None and (bad := int(np.isnan(predicted).any(axis=1).sum())):
            raise UserError(f"{who}: gives no number for {bad} of {len(labels)} images; its weights are not finite")
    own = scores.summary(scores.per_image(found, labels, beside))
    result = {"images": len(labels), "images_per_second": rate, **own}
    if teacher:
        result["teacher"] = scores.summary(scores.per_image(beside, labels))
    if classes:
        result |= {"labels": labels, "predicted": found.argmax(axis=1)}
        if teacher:
            result["teacher"]["predicted"] = beside.argmax(axis=1)
    return result


def _predict(log_probabilities: Callable, split, batch_size: int, devices: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(log-probabilities [N, classes], labels [N], images a second without the first batch, whose program is compiled)."""
    devices *= (processes := jax.process_count())
    batch_size = -(-min(batch_size, len(split)) // devices) * devices
    batches = data.eval_batches(split, batch_size, jax.process_index(), processes)
    first = next(batches)
    jax.block_until_ready(log_probabilities(first["image"]))
    begun, results, labels, real = time.perf_counter(), [], [], []
    for batch in itertools.chain([first], batches):
        results.append(log_probabilities(batch["image"]))
        labels.append(batch["label"])
        real.append(batch["mask"] > 0)
    jax.block_until_ready(results)
    rate = len(results) * batch_size / (time.perf_counter() - begun)
    whole = [_in_order(rows) for rows in ([np.asarray(r) for r in results], labels, real)]
    return whole[0][whole[2]], whole[1][whole[2]], rate


def _in_order(batches: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of all batches [N, ...] as one process would have them, of each process's share of every batch [b, ...]."""
    shares = distributed.gather_rows(np.stack(batches))
    return np.moveaxis(shares, 0, 1).reshape(-1, *shares.shape[3:])


def score(network: Any, images: Any, *, teacher: Any = None, batch_size: int = 256) -> dict:
    """Scores of a trained network on images and labels, alone or beside a teacher: top1, top5, calibration_error and agreement
    in percent, nll and divergence in nats; with a teacher also "teacher": its own.

    network, teacher: a `Student`, a `Network`, or a `Teacher`, which is scored at its widest (`teacher.at(0.5)` is a network of
    its own). images: (images, labels), a split, or a `Task`, whose test images are meant.
    """
    images = getattr(images, "test", images)
    if images is None:
        raise UserError("images: this task has no test images; give it some (test=), or (images, labels) here")
    split = data.as_split(images)

    def of(x: Any) -> Network:
        found = x.network if hasattr(x, "network") else x.at() if hasattr(x, "cards") else x
        if not hasattr(found, "card"):
            raise UserError(f"network: should be a Student, a Teacher or a Network, and this is a {type(x).__name__}")
        return found

    card = of(network).card
    if list(split.image_shape) != list(card["image_shape"]):
        raise UserError(f"images: are {list(split.image_shape)}, and this network takes {card['image_shape']}")
    if isinstance(split, data.Split) and len(split) and int(split.labels.max()) >= card["num_classes"]:
        raise UserError(f"images: a label is {int(split.labels.max())}, and this network knows {card['num_classes']} classes")
    own, devices = predictor(of(network))
    beside = None if teacher is None else predictor(of(teacher))[0]
    return score_predictions(own, split, teacher=beside, batch_size=batch_size, devices=devices)
