"""Streamlined knowledge distillation (Jeong, Lee and Choi, CVPR 2026): each image's logits, and the angles between images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.scipy.linalg

from pwkd_jax.distillers.feature_maps import gram, normalise
from pwkd_jax.distillers.logits import above_zero, kl, log_softmax, wide
from pwkd_jax.distillers.temperature import TEMPERATURE
from pwkd_jax.errors import UserError


def direction_loss(student_logits: jax.Array, teacher_logits: jax.Array, tikhonov: float) -> jax.Array:
    """Mean over images of sqrt(d' (S + tikhonov I)^-1 d), logits [B, classes] to a scalar.

    d [B] is an image's row of the difference of the networks' cosines between all images, S the covariance (ddof 1) of those
    rows over the batch. Gradients pass through S too.
    """
    ours, theirs = (normalise(wide(z)) for z in (student_logits, teacher_logits))
    off = gram(ours, ours) - gram(theirs, theirs)
    centred = off - jnp.mean(off, axis=0)
    covariance = gram(centred.T, centred.T) / (len(off) - 1) + tikhonov * jnp.eye(len(off), dtype=off.dtype)
    # The same as with the inverse, whose square root it is: |L^-1 d|.
    solved = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(covariance), off.T, lower=True)
    squared = jnp.sum(solved**2, axis=0)
    # Networks that agree have a row of zeros, at which the root's slope is infinite: its gradient is taken to be 0.
    return jnp.mean(jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0))


class Streamlined(nn.Module):
    """KL of logits softened by T, without T^2, plus `direction_loss`, both at weight 1 beside full cross entropy.

    Temperature and tikhonov are those of the authors' code, as torchdistill has them; needs batches of two images or more.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    direction_weight: float = 1.0
    temperature: float = TEMPERATURE
    tikhonov: float = 0.1

    def __post_init__(self):
        above_zero(temperature=self.temperature, tikhonov=self.tikhonov)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        if len(student.logits) < 2:
            raise UserError("student.distiller: streamlined compares images of a batch, and there is one; take larger batches")
        instance = jnp.mean(kl(*(log_softmax(z, self.temperature) for z in (teacher.logits, student.logits))))
        direction = direction_loss(student.logits, teacher.logits, self.tikhonov)
        return instance + self.direction_weight * direction, {"instance": instance, "direction": direction}
