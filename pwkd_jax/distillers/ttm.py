"""Transformed teacher matching (Zheng and Yang, ICLR 2024, arXiv 2402.11148): temperature for the teacher alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import above_zero, kl, log_softmax, wide


def ttm_losses(student_logits: jax.Array, teacher_logits: jax.Array, exponent: float) -> tuple[jax.Array, jax.Array]:
    """(TTM, weighted TTM) of logits [B, classes], two scalars: means over images of KL(q || p_s) and of U KL(q || p_s).

    q = p_t^exponent / U with U = sum over classes of p_t^exponent, which is the softmax at temperature 1 / exponent; the
    student's p_s has none. U is 1 for a sure teacher and grows with its doubt, to C^(1 - exponent). There is no T^2.
    """
    off = kl(log_softmax(teacher_logits, 1 / exponent), log_softmax(student_logits))
    doubt = jnp.exp(jax.nn.logsumexp(exponent * jax.nn.log_softmax(wide(teacher_logits)), axis=-1))
    return jnp.mean(off), jnp.mean(doubt * off)


class TTM(nn.Module):
    """The first of `ttm_losses` beside full cross entropy, at the authors' example's exponent and weight, for vgg13-vgg8."""

    ce_weight: float = 1.0
    weight: float = 45.0
    exponent: float = 0.1

    def __post_init__(self):
        above_zero(exponent=self.exponent)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        return ttm_losses(student.logits, teacher.logits, self.exponent)[0], {}


class WTTM(nn.Module):
    """The second of `ttm_losses` beside full cross entropy, at the exponent and weight of the authors' example `crd+wttm`."""

    ce_weight: float = 1.0
    weight: float = 4.0
    exponent: float = 0.2

    def __post_init__(self):
        above_zero(exponent=self.exponent)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        return ttm_losses(student.logits, teacher.logits, self.exponent)[1], {}
