"""Relational knowledge distillation (Park et al., CVPR 2019, arXiv 1904.05068)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pwkd_jax.distillers.feature_maps import gram, normalise
from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError


def relative_distances(x: jax.Array) -> jax.Array:
    """[B, D] to [B, B]: Euclidean distances over their mean off the diagonal; zeros where all samples agree."""
    # Centred first: distances do not change, and their three terms then cancel less.
    x = wide(x)
    x = x - jnp.mean(x, axis=0)
    products = gram(x, x)
    norms = jnp.diagonal(products)
    square = norms[:, None] + norms[None, :] - 2.0 * products
    # A sample and itself, or its equal, are at distance 0 with a gradient of 0, where the square root has none.
    apart = square > 1e-12
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)
    mean = jnp.sum(distance) / max(len(x) * (len(x) - 1), 1)
    return distance / jnp.where(mean > 0, mean, 1.0)


def distance_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean over B^2 pairs of the Huber loss (threshold 1) between the `relative_distances`; [B, D_s], [B, D_t]."""
    return jnp.mean(optax.huber_loss(relative_distances(student), relative_distances(teacher)))


def angle_loss(student: jax.Array, teacher: jax.Array, chunk: int) -> jax.Array:
    """Mean over B^3 triples of the Huber loss (threshold 1) between e_ij . e_ik, e_ij = (x_j - x_i) / |x_j - x_i|.

    student [B, D_s], teacher [B, D_t]. Walks `chunk` values of i at a time, and again for the gradient, so that memory
    is O(chunk * B * (B + D)) rather than B^3.
    """
    student, teacher = wide(student), wide(teacher)

    def cosines(x: jax.Array, corner: jax.Array) -> jax.Array:
        e = normalise(x - corner)
        return gram(e, e)

    @jax.checkpoint
    def at_corner(corners: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.mean(optax.huber_loss(cosines(student, corners[0]), cosines(teacher, corners[1])))

    return jnp.mean(jax.lax.map(at_corner, (student, teacher), batch_size=min(chunk, len(student))))


class RKD(nn.Module):
    """distance_weight * `distance_loss` + angle_weight * `angle_loss` of the pooled features.

    Weights are RepDistiller's and mdistiller's for every CIFAR pair. chunk: samples in whose corner angles are taken at
    once; it changes memory and speed, not the loss.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    distance_weight: float = 25.0
    angle_weight: float = 50.0
    chunk: int = 32

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"chunk: {self.chunk} is not possible; it should be 1 or more")
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        need("RKD", student, teacher, "pooled")
        distance = distance_loss(student.pooled, teacher.pooled)
        angle = angle_loss(student.pooled, teacher.pooled, self.chunk)
        return self.distance_weight * distance + self.angle_weight * angle, {"distance": distance, "angle": angle}
