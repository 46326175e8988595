"""Correlation congruence (Peng et al., ICCV 2019, arXiv 1904.01802), in the form that the CIFAR benchmarks report."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError


def cc_loss(student_embedding: jax.Array, teacher_embedding: jax.Array) -> jax.Array:
    """Mean over i < B - 1 of sum over k of d[i, k] d[i + 1, k], d = |e_s - e_t|; both [B, D], gives a scalar.

    A product of neighbours in the batch, as in RepDistiller; the paper compares two B x B Gaussian kernels.
    """
    d = jnp.abs(wide(student_embedding) - wide(teacher_embedding))
    return jnp.mean(jnp.sum(d[:-1] * d[1:], axis=-1))


class CC(nn.Module):
    """`cc_loss` of linear embeddings of both pooled features, at RepDistiller's weight for every CIFAR pair.

    Both embeddings train, the teacher's too. features: their size.
    """

    ce_weight: float = 1.0
    weight: float = 0.02
    features: int = 128

    def __post_init__(self):
        if self.features < 1:
            raise UserError(f"features: {self.features} is not possible; it should be 1 or more")
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("CC", student, teacher, "pooled")
        if len(student.pooled) < 2:
            raise UserError("student.distiller: CC compares neighbours in the batch, so it needs a batch of 2 or more")
        embed = {who: nn.Dense(self.features, kernel_init=uniform, name=who) for who in ("student", "teacher")}
        return cc_loss(embed["student"](wide(student.pooled)), embed["teacher"](wide(teacher.pooled))), {}
