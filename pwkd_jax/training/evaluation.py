"""Evaluation on a whole split, every image counted exactly once, and the ensemble of snapshots."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from pwkd_jax import data, models, slimmable
from pwkd_jax.training import metrics, preemption, sharding


class Evaluator:
    """Scores models on one split; one compilation for each model, whatever the arm, seed or epoch.

    normalise: uint8 images [B, H, W, C] -> float32. `score(model, variables, batch)` is the compiled program of a batch of
    `batch_size` images, the size asked for rounded up to whole devices.
    """

    def __init__(self, mesh, split: data.Split, batch_size: int, normalise: Callable):
        self._mesh, self._split = mesh, split
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

        def logits(model, variables, batch):
            return models.apply(model, variables, normalise(batch["image"]), train=False)[0].logits

        def score(model, variables, batch):
            z = logits(model, variables, batch)
            values = {"top1": metrics.top1(z, batch["label"]), "loss": slimmable.cross_entropy(z, batch["label"])}
            return metrics.collect(values, batch["mask"])

        # Replicated, so that every process can read them.
        whole = {"static_argnums": 0, "out_shardings": sharding.replicated(mesh)}
        self.score = jax.jit(score, **whole)
        self._softmax = jax.jit(lambda *args: jax.nn.softmax(logits(*args)), **whole)

    def _batches(self):
        for batch in data.eval_batches(self._split, self.batch_size, jax.process_index(), jax.process_count()):
            preemption.check()
            yield sharding.put_batch(self._mesh, batch)

    def __call__(self, model, variables: dict) -> dict[str, float]:
        """{"top1": percent, "loss": mean cross entropy} of a model and its {"params", "batch_stats"}."""
        return metrics.mean(self.score(model, variables, batch) for batch in self._batches())

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
