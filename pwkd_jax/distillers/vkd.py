"""VkD: knowledge distillation by an orthogonal projection (Miles, Elezi and Deng, CVPR 2024, arXiv 2403.06213)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.scipy.linalg

from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.taps import need

EPS = 1e-5


def orthogonal(free: jax.Array) -> jax.Array:
    """A matrix P [S, T] of orthonormal rows, where S <= T, or columns, from a free one alike in shape.

    With the longer side n and the shorter one k: A is the lower triangle of the free matrix, turned upright, in the first k of
    n columns, less its transpose; P the first k columns of exp(A), which is orthogonal since A' = -A. Any leading block of the
    free matrix gives an orthogonal P of that shape, which is not a block of the P of the whole.
    """
    narrows = free.shape[0] > free.shape[1]
    tall = wide(free) if narrows else wide(free).T
    n, k = tall.shape
    lower = jnp.pad(jnp.tril(tall), ((0, 0), (0, n - k)))
    rotation = jax.scipy.linalg.expm(lower - lower.T)[:, :k]
    return rotation if narrows else rotation.T


def standardised(x: jax.Array) -> jax.Array:
    """[B, D] with mean 0 and variance 1 over the features of every image: layer norm without parameters."""
    x = wide(x)
    off = x - jnp.mean(x, axis=-1, keepdims=True)
    return off * jax.lax.rsqrt(jnp.mean(off**2, axis=-1, keepdims=True) + EPS)


def smooth_l1(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean over every element of d^2 / 2 where d = |a - b| is below 1, and of d - 1/2 elsewhere; a scalar."""
    d = jnp.abs(wide(a) - wide(b))
    return jnp.mean(jnp.where(d < 1, 0.5 * d**2, d - 0.5))


class VkD(nn.Module):
    """`smooth_l1` of the student's pooled features, through an `orthogonal` projection, from the teacher's, `standardised`.

    The projection keeps all angles and lengths, so that only the student itself can learn. It is made at the width that
    teaches, from a leading block of what trains, and so is orthogonal at every one. Beside full cross entropy at weight 1, the
    authors' for RegNetY to DeiT on ImageNet, who add KD at T = 1 by a distillation token (`kd+vkd`). They give no CIFAR
    setting. Their code's map is exp for equal sides and Householder's for others, whose signs their weight decay puts to 0 in
    one step, and with them the projection; decay takes this one no further than to the identity. Their whitening, for
    generating images, needs more images than features and is left out.
    """

    ce_weight: float = 1.0
    weight: float = 1.0

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("VkD", student, teacher, "pooled")
        s, target = wide(student.pooled), standardised(teacher.pooled)
        # Angles of about a radian: from there the student's features are spread over all of the teacher's.
        start = nn.initializers.normal(s.shape[-1] ** -0.5)
        free = self.param("projection", start, (s.shape[-1], target.shape[-1]))
        return smooth_l1(jnp.dot(s, orthogonal(free), precision="highest"), target), {}
