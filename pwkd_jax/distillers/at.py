"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import match, normalise, stage_pairs
from pwkd_jax.distillers.logits import wide
from pwkd_jax.errors import UserError


def attention(x: jax.Array, p: float) -> jax.Array:
    """[B, H, W, C] to [B, H * W]: the mean over channels of |x|^p, scaled to length 1 over the pixels."""
    energy = jnp.mean(jnp.abs(wide(x)) ** p, axis=-1)
    return normalise(energy.reshape(len(x), -1))


def at_loss(student_map: jax.Array, teacher_map: jax.Array, p: float) -> jax.Array:
    """Mean over batch and pixels of (a_s - a_t)^2, a the `attention`; maps [B, H, W, C] of any sizes, gives a scalar.

    The larger map is average-pooled to the smaller one's size. The mean over pixels (the paper sums) is what the usual
    weight of 1000 makes up for.
    """
    s, t = match(wide(student_map), wide(teacher_map))
    return jnp.mean((attention(s, p) - attention(t, p)) ** 2)


class AT(nn.Module):
    """`at_loss` summed over the stages, at RepDistiller's and mdistiller's weight for every CIFAR pair."""

    ce_weight: float = 1.0
    weight: float = 1000.0
    p: float = 2.0

    def __post_init__(self):
        if self.p < 1:
            raise UserError(f"p: {self.p:g} is not possible; below 1 the gradient is infinite at zero")
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        return sum(at_loss(s, t, self.p) for s, t in stage_pairs("AT", student, teacher)), {}
