"""ABKD: the alpha-beta divergence (Wang et al., ICML 2025, arXiv 2505.04560)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import above_zero, log_softmax
from pwkd_jax.distillers.temperature import TEMPERATURE


def ab_divergence(
    student_logits: jax.Array, teacher_logits: jax.Array, alpha: float, beta: float, temperature: float
) -> jax.Array:
    """Mean over images of -1 / (a b) sum over classes of p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b).

    p and q are the teacher's and the student's softmax(z / T) of logits [B, C], a and b above 0. It goes to KL(p || q) where a
    is 1 and b goes to 0; at 1/2 both it is four times the squared Hellinger distance. There is no T^2.
    """
    p, q = (log_softmax(z, temperature) for z in (teacher_logits, student_logits))
    both, total = alpha * p + beta * q, alpha + beta
    terms = jnp.exp(both) - alpha / total * jnp.exp(total * p) - beta / total * jnp.exp(total * q)
    return -jnp.mean(jnp.sum(terms, axis=-1)) / (alpha * beta)


class ABKD(nn.Module):
    """`ab_divergence` beside full cross entropy, at the authors' example for resnet56 to resnet20."""

    ce_weight: float = 1.0
    weight: float = 32.0
    alpha: float = 0.8
    beta: float = 0.3
    temperature: float = TEMPERATURE

    def __post_init__(self):
        above_zero(alpha=self.alpha, beta=self.beta, temperature=self.temperature)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        return ab_divergence(student.logits, teacher.logits, self.alpha, self.beta, self.temperature), {}
