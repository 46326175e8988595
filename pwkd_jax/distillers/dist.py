"""DIST: distillation from a stronger teacher by correlations (Huang, You et al., NeurIPS 2022, arXiv 2205.10536)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import above_zero, log_softmax
from pwkd_jax.distillers.temperature import TEMPERATURE

EPS = 1e-8


def correlation(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Pearson's correlation of two matrices along `axis`, 0 where either side is constant; one value a line."""
    a, b = (x - jnp.mean(x, axis=axis, keepdims=True) for x in (a, b))
    squared = [jnp.sum(x**2, axis=axis) for x in (a, b)]
    # A constant line has norm 0, where the root's slope is infinite: take its gradient to be 0 there.
    norms = [jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1.0)), 0.0) for s in squared]
    return jnp.sum(a * b, axis=axis) / (norms[0] * norms[1] + EPS)


def dist_losses(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """(inter-class, intra-class) relation losses of logits [B, C], two scalars; q = softmax(z / T).

    Inter: T^2 (1 - mean over samples of the correlation of q_s[b, :] with q_t[b, :]).
    Intra: T^2 (1 - mean over classes of the correlation of q_s[:, c] with q_t[:, c]), so over the whole batch.
    """
    s, t = (jnp.exp(log_softmax(z, temperature)) for z in (student_logits, teacher_logits))
    return tuple(temperature**2 * (1.0 - jnp.mean(correlation(s, t, axis))) for axis in (1, 0))


class DIST(nn.Module):
    """`beta` inter + `gamma` intra, weighted 2 beside full cross entropy.

    Defaults are the authors' for CIFAR-100, all pairs alike; on ImageNet T = 1.
    """

    ce_weight: float = 1.0
    weight: float = 2.0
    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = TEMPERATURE

    def __post_init__(self):
        above_zero(temperature=self.temperature)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        inter, intra = dist_losses(student.logits, teacher.logits, self.temperature)
        return self.beta * inter + self.gamma * intra, {"inter_class": inter, "intra_class": intra}
