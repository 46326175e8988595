"""Masked generative distillation (Yang, Li, Shao, Shi, Yuan and Yuan, ECCV 2022, arXiv 2205.01529)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import match
from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError


def mgd_loss(generated: jax.Array, teacher: jax.Array) -> jax.Array:
    """1/B * sum over every element of (generated - teacher)^2; two maps [B, H, W, C] alike in shape, gives a scalar."""
    return jnp.sum((wide(generated) - wide(teacher)) ** 2) / teacher.shape[0]


def drop_channels(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """x [B, H, W, C] with each image's channels set to zero with probability `rate`, the others as they were."""
    return x * jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, x.shape[-1]))


class MGD(nn.Module):
    """`mgd_loss` between the teacher's last map and one generated from what is left of the student's.

    The student's is aligned by a 1x1 convolution, loses `masked` of its channels at random, and passes 3x3, ReLU, 3x3;
    rate and weight are the authors' for ImageNet classification (ResNet-34 to ResNet-18). They align only where channel
    counts differ; here always, since the counts change from stage to stage. Of two sizes, the larger map is averaged
    to the smaller.
    """

    ce_weight: float = 1.0
    weight: float = 7e-5
    masked: float = 0.15

    def __post_init__(self):
        if not 0 <= self.masked < 1:
            raise UserError(f"masked: {self.masked:g} is not possible; it should be from 0 to below 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("MGD", student, teacher, "stages")
        s, t = match(wide(student.stages[-1]), wide(teacher.stages[-1]))
        features = t.shape[-1]
        s = nn.Conv(features, (1, 1), kernel_init=uniform, name="align")(s)
        s = drop_channels(self.make_rng("distiller"), s, self.masked)
        s = nn.relu(nn.Conv(features, (3, 3), padding=1, kernel_init=uniform, name="generate1")(s))
        return mgd_loss(nn.Conv(features, (3, 3), padding=1, kernel_init=uniform, name="generate2")(s), t), {}
