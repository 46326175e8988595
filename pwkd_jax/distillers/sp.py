"""Similarity-preserving distillation (Tung and Mori, ICCV 2019, arXiv 1907.09682)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import gram, normalise
from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.taps import need


def similarity(x: jax.Array) -> jax.Array:
    """[B, ...] to [B, B]: inner products of the samples' features, each row scaled to length 1."""
    rows = wide(x).reshape(len(x), -1)
    return normalise(gram(rows, rows))


def sp_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """sum((G_s - G_t)^2) / B^2, G the `similarity` of a batch; features [B, ...] of any two shapes, gives a scalar."""
    return jnp.mean((similarity(student_features) - similarity(teacher_features)) ** 2)


class SP(nn.Module):
    """`sp_loss` of the last stage's maps, at RepDistiller's and mdistiller's weight for every CIFAR pair."""

    ce_weight: float = 1.0
    weight: float = 3000.0

    def __call__(self, student, teacher, batch, progress):
        need("SP", student, teacher, "stages")
        return sp_loss(student.stages[-1], teacher.stages[-1]), {}
