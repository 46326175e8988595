"""Normalised knowledge distillation (Yang, Zeng, Li, Zhang, Yuan and Li, ICCV 2023, arXiv 2303.13005)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import above_zero, chosen, log_softmax


def nkd_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, gamma: float, temperature: float
) -> jax.Array:
    """Mean over the batch of -q_t(y) log q_s(y) - gamma T^2 * sum over c != y of p_t(c) log p_s(c); a scalar.

    Logits [B, C], labels [B]. q is the plain softmax; p the softmax of z / T over the classes other than y, which sums
    to 1 on both sides, so that this cross entropy is least where the two agree. The loss's least value is not 0.
    """
    label = chosen(labels, student_logits.shape[-1])
    q_s, q_t = (log_softmax(z) for z in (student_logits, teacher_logits))
    target = -jnp.sum(jnp.where(label, jnp.exp(q_t) * q_s, 0.0), axis=-1)
    p_s, p_t = (log_softmax(z, temperature, ~label) for z in (student_logits, teacher_logits))
    others = -jnp.sum(jnp.exp(p_t) * p_s, axis=-1)
    return jnp.mean(target + gamma * temperature**2 * others)


class NKD(nn.Module):
    """`nkd_loss` beside full cross entropy, at the authors' ImageNet setting: gamma 1.5, T = 1 (3.5 and 3 on CIFAR-100)."""

    ce_weight: float = 1.0
    weight: float = 1.0
    gamma: float = 1.5
    temperature: float = 1.0

    def __post_init__(self):
        above_zero(temperature=self.temperature)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        return nkd_loss(student.logits, teacher.logits, batch["label"], self.gamma, self.temperature), {}
