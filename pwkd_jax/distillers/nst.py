"""Neuron selectivity transfer (Huang and Wang, arXiv 1707.01219)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import gram, match, normalise, stage_pairs
from pwkd_jax.distillers.logits import wide


def nst_loss(student_map: jax.Array, teacher_map: jax.Array) -> jax.Array:
    """Squared maximum mean discrepancy between the channels of two maps, with the kernel k(a, b) = (a . b)^2; a scalar.

    mean over channels of k(s, s') + k(t, t') - 2 k(s, t), then over the batch. A channel is its map [H * W] scaled to
    length 1. Maps [B, H, W, C] of any sizes, the larger average-pooled to the smaller; channel counts may differ.
    """
    s, t = match(wide(student_map), wide(teacher_map))
    s, t = (normalise(x.reshape(len(x), -1, x.shape[-1]), axis=1) for x in (s, t))
    if s.shape[1] <= max(s.shape[2], t.shape[2]):
        # The same number from pixels: the mean of k is an inner product of mean outer products of the channels.
        s, t = (gram(x, x) / x.shape[2] for x in (s, t))
        return jnp.mean(jnp.sum((s - t) ** 2, axis=(1, 2)))
    s, t = (jnp.swapaxes(x, 1, 2) for x in (s, t))
    ss, tt, st = (jnp.mean(gram(*pair) ** 2) for pair in ((s, s), (t, t), (s, t)))
    return ss + tt - 2.0 * st


class NST(nn.Module):
    """`nst_loss` summed over the stages, at RepDistiller's and mdistiller's weight for every CIFAR pair."""

    ce_weight: float = 1.0
    weight: float = 50.0

    def __call__(self, student, teacher, batch, progress):
        return sum(nst_loss(s, t) for s, t in stage_pairs("NST", student, teacher)), {}
