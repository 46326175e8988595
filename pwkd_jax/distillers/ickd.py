"""Inter-channel correlation for knowledge distillation (Liu et al., ICCV 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import gram, normalise
from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need


def ickd_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 / (B C) * sum of (G_s - G_t)^2, G [B, C, C] the products of channels over an image's pixels, each row of unit length.

    Maps [B, H, W, C] of equally many channels; their heights and widths may differ.
    """

    def correlations(x: jax.Array) -> jax.Array:
        channels = wide(x).reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)
        return normalise(gram(channels, channels))

    ours, theirs = correlations(student), correlations(teacher)
    return jnp.sum((ours - theirs) ** 2) / (ours.shape[0] * ours.shape[1])


class ICKD(nn.Module):
    """`ickd_loss` of the last maps, the student's through a 1x1 convolution and batch norm to the teacher's channels.

    Weighted 2.5 beside full cross entropy, the authors' for resnet32x4-resnet8x4; they add KD at weight 1 (`kd+ickd`) too.
    """

    ce_weight: float = 1.0
    weight: float = 2.5

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("ICKD", student, teacher, "stages", stages=1)
        target = wide(teacher.stages[-1])
        embed = nn.Conv(target.shape[-1], (1, 1), use_bias=False, kernel_init=uniform, name="conv")
        norm = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name="norm")
        return ickd_loss(norm(embed(wide(student.stages[-1]))), target), {}
