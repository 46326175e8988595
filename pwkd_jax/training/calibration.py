"""Batch-norm statistics measured anew, for widths that were trained without their own."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax import models


def batch_statistics(model: nn.Module, variables: dict, images: jax.Array, key: jax.Array | None = None) -> dict:
    """The batch-norm statistics of this one batch, with nothing of the running ones mixed in. key: for a model with dropout.

    Whatever layers the model has, a training pass gives keep * old + (1 - keep) * batch for some fraction `keep`. Old
    statistics of 1 and of 0 differ by `keep` in the result; a blank image shows it free of rounding by large values.
    """

    def after(old: float, images: jax.Array) -> dict:
        stats = jax.tree.map(lambda s: jnp.full_like(s, old), variables["batch_stats"])
        return models.apply(model, {**variables, "batch_stats": stats}, images, train=True, key=key)[1]

    blank = jnp.zeros_like(images[:1])
    keep = jax.tree.map(lambda one, zero: jnp.median(one - zero), after(1.0, blank), after(0.0, blank))
    return jax.tree.map(lambda s, k: s / (1 - k), after(0.0, images), keep)


def calibrate(batch_stats: Callable[[int], dict], batches: int) -> dict:
    """Mean over `batches` of `batch_stats(i)`, the true cumulative mean: every batch weighs the same, in any order.

    An exponential average would leave 0.9^n of the old value behind; the sum is taken in float64 on the host.
    """
    sums = None
    for i in range(batches):
        stats = jax.tree.map(lambda x: jax.device_get(x).astype("float64"), batch_stats(i))
        sums = stats if sums is None else jax.tree.map(lambda a, b: a + b, sums, stats)
    return jax.tree.map(lambda x: jnp.asarray(x / batches, jnp.float32), sums)


def calibration_batches(images: int, batch_size: int) -> int:
    return math.ceil(images / batch_size)
