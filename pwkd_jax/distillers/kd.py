"""Knowledge distillation by softened logits (Hinton, Vinyals and Dean, arXiv 1503.02531)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.temperature import TEMPERATURE
from pwkd_jax.errors import UserError


def kd_loss(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """T^2 / B * sum over batch and classes of q_t log(q_t / q_s), q = softmax(z / T); both [B, classes], gives a scalar.

    T^2 keeps the gradient's size about independent of T. Computed in log space, so that no softmax underflows.
    """
    log_s, log_t = (jax.nn.log_softmax(wide(z) / temperature) for z in (student_logits, teacher_logits))
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1))


class KD(nn.Module):
    """`kd_loss` at T = 4, weighted 0.9 beside 0.1 of cross entropy: RepDistiller's and mdistiller's CIFAR setting."""

    ce_weight: float = 0.1
    weight: float = 0.9
    temperature: float = TEMPERATURE

    def __post_init__(self):
        if self.temperature <= 0:
            raise UserError(f"temperature: {self.temperature:g} is not possible; it should be above 0")
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        return kd_loss(student.logits, teacher.logits, self.temperature), {}
