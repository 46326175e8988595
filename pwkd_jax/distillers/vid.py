"""Variational information distillation (Ahn et al., CVPR 2019, arXiv 1904.05835)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import match, stage_pairs
from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.errors import UserError

FLOOR = 1e-5  # below which no variance falls


def vid_loss(mean: jax.Array, scale: jax.Array, target: jax.Array) -> jax.Array:
    """Mean of ((mean - target)^2 / var + log var) / 2 over every element, var = softplus(scale) + 1e-5; a scalar.

    A Gaussian's negative log likelihood without its constant, so it may be negative. Maps [B, H, W, C], scale [C].
    """
    variance = jax.nn.softplus(wide(scale)) + FLOOR
    return 0.5 * jnp.mean((wide(mean) - wide(target)) ** 2 / variance + jnp.log(variance))


class Guess(nn.Module):
    """What the student's map [B, H, W, C] says of the teacher's: mean [B, H, W, features], raw variance [features].

    Three 1x1 convolutions without bias, ReLU between; one variance a channel, `initial_variance` at first.
    """

    features: int
    initial_variance: float

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for i in range(3):
            x = nn.relu(x) if i else x
            x = nn.Conv(self.features, (1, 1), use_bias=False, kernel_init=uniform, name=f"conv{i + 1}")(x)
        raw = math.log(math.expm1(self.initial_variance - FLOOR))
        return x, self.param("scale", nn.initializers.constant(raw), (self.features,))


class VID(nn.Module):
    """`vid_loss` summed over the stages, at RepDistiller's and mdistiller's weight for every CIFAR pair.

    The larger map of a stage is average-pooled to the smaller one's size. The variances train with the rest.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    initial_variance: float = 5.0

    def __post_init__(self):
        if self.initial_variance <= FLOOR:
            raise UserError(f"initial_variance: {self.initial_variance:g} is not possible; it should exceed {FLOOR:g}")
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        loss = 0.0
        for i, (s, t) in enumerate(stage_pairs("VID", student, teacher), start=1):
            s, t = match(s, t)
            loss += vid_loss(*Guess(t.shape[-1], self.initial_variance, name=f"stage{i}")(s), t)
        return loss, {}
