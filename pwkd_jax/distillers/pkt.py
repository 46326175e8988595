"""Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018, arXiv 1803.10837)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import gram, normalise
from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.taps import need

EPS = 1e-7  # keeps the logarithms finite


def neighbours(x: jax.Array) -> jax.Array:
    """[B, D] to [B, B]: how likely each sample is another's neighbour, (cosine + 1) / 2 over its row's sum."""
    x = normalise(wide(x))
    similarity = 0.5 * (gram(x, x) + 1.0)
    return similarity / jnp.sum(similarity, axis=-1, keepdims=True)


def pkt_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean over B^2 of P_t log((P_t + eps) / (P_s + eps)), P the `neighbours`; [B, D_s], [B, D_t], gives a scalar.

    The mean, where a divergence would sum over a row, is what the usual weight of 30000 makes up for.
    """
    s, t = neighbours(student), neighbours(teacher)
    return jnp.mean(t * (jnp.log(t + EPS) - jnp.log(s + EPS)))


class PKT(nn.Module):
    """`pkt_loss` of the pooled features, at RepDistiller's and mdistiller's weight for every CIFAR pair."""

    ce_weight: float = 1.0
    weight: float = 30000.0

    def __call__(self, student, teacher, batch, progress):
        need("PKT", student, teacher, "pooled")
        return pkt_loss(student.pooled, teacher.pooled), {}
