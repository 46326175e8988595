"""A simple recipe for distillation: a projector, batch norm and a soft maximum (Miles and Mikolajczyk, AAAI 2024)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need

EPS = 1e-4


def srd_loss(student: jax.Array, teacher: jax.Array, exponent: float) -> jax.Array:
    """log of the sum over batch and features of |s - t|^exponent; [B, D] both, gives a scalar.

    In terms of the largest difference, whose power alone could overflow; where none differs, that of the smallest number.
    """
    off = jnp.abs(wide(student) - wide(teacher))
    tiny = jnp.finfo(off.dtype).tiny
    logs = jnp.where(off > tiny, jnp.log(jnp.where(off > tiny, off, 1.0)), jnp.log(tiny))
    return jax.nn.logsumexp(exponent * logs)


class SRD(nn.Module):
    """2 * `srd_loss` of the pooled features, the student's through a linear layer, both normalised over the batch, plus KL of
    the logits at T = 1 (`temperature`), at weight 1 beside full cross entropy: the authors' for ImageNet.

    feature_weight: of the first; the factor of 2 is the authors'.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    feature_weight: float = 2.0
    exponent: float = 4.0
    temperature: float = 1.0

    def __post_init__(self):
        above_zero(exponent=self.exponent, temperature=self.temperature)
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("SRD", student, teacher, "pooled")
        target = wide(teacher.pooled)
        # The linear layer's bias would be taken out again.
        projected = nn.Dense(target.shape[-1], use_bias=False, kernel_init=uniform, name="linear")(wide(student.pooled))
        feature = srd_loss(normed(projected), normed(target), self.exponent)
        logits = kd_loss(student.logits, teacher.logits, self.temperature) / self.temperature**2
        return self.feature_weight * feature + logits, {"feature": feature, "logits": logits}


def normed(x: jax.Array) -> jax.Array:
    """[B, D] with mean 0 and variance 1 of every feature over the batch: batch norm without parameters."""
    x = wide(x)
    return (x - jnp.mean(x, axis=0)) * jax.lax.rsqrt(jnp.var(x, axis=0) + EPS)
