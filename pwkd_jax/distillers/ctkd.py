"""Curriculum temperature for knowledge distillation (Li, Li, Yang et al., AAAI 2023, arXiv 2211.16231)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.errors import UserError


def reverse(x: jax.Array, strength) -> jax.Array:
    """x itself, whose gradient arrives multiplied by -strength: descending for all else ascends for x."""
    return jax.lax.stop_gradient(x) - strength * (x - jax.lax.stop_gradient(x))


def curriculum(epoch: jax.Array, length: float) -> jax.Array | float:
    """(1 - cos(pi min(epoch / length, 1))) / 2: from 0 to 1 over the first `length` epochs, always 1 where it is 0."""
    return (1.0 - jnp.cos(math.pi * jnp.minimum(epoch / length, 1.0))) / 2.0 if length > 0 else 1.0


class CTKD(nn.Module):
    """`kd_loss` at one learned temperature that is trained to make the loss larger, 0.9 beside 0.1 of cross entropy.

    T = lowest + span * sigmoid(r), the paper's "Global-T"; r is trained by the reversed gradient, whose strength grows
    from 0 to 1 on a cosine over the first `curriculum_epochs` of every stage (easy to hard), while T itself is carried
    across stages. T starts at `start`: the authors' r = 1 makes 1 + 20 sigmoid(1) = 15.62. Defaults are theirs.
    """

    ce_weight: float = 0.1
    weight: float = 0.9
    lowest: float = 1.0
    span: float = 20.0
    start: float = 15.62
    curriculum_epochs: float = 10.0

    def __post_init__(self):
        above_zero(lowest=self.lowest, span=self.span)
        if not self.lowest < self.start < self.lowest + self.span:
            raise UserError(
                f"start: {self.start:g} is not possible; it should lie between lowest = {self.lowest:g} and "
                f"lowest + span = {self.lowest + self.span:g}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        share = (self.start - self.lowest) / self.span
        raw = self.param("raw", nn.initializers.constant(math.log(share / (1.0 - share))), ())
        raw = reverse(raw, curriculum(progress.epoch, self.curriculum_epochs))
        temperature = self.lowest + self.span * jax.nn.sigmoid(raw)
        return kd_loss(wide(student.logits), wide(teacher.logits), temperature), {"temperature": temperature}
