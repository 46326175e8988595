"""Multi-level logit distillation (Jin, Wang and Lin, CVPR 2023)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.distillers.logits import above_zero, log_softmax, wide
from pwkd_jax.errors import UserError


def _gram(x: jax.Array) -> jax.Array:
    # Two nearly equal matrices are subtracted: an accelerator's default product would leave only its rounding.
    return jnp.matmul(x, x.T, precision="highest")


def batch_loss(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """|Q_t Q_t' - Q_s Q_s'|^2 / B, Q = softmax(z / T) of logits [B, C]: which samples look alike."""
    s, t = (jnp.exp(log_softmax(z, temperature)) for z in (student_logits, teacher_logits))
    return jnp.sum((_gram(t) - _gram(s)) ** 2) / s.shape[0]


def class_loss(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """|Q_t' Q_t - Q_s' Q_s|^2 / C, Q = softmax(z / T) of logits [B, C]: which classes go together."""
    s, t = (jnp.exp(log_softmax(z, temperature)) for z in (student_logits, teacher_logits))
    return jnp.sum((_gram(t.T) - _gram(s.T)) ** 2) / s.shape[1]


class MLKD(nn.Module):
    """KD + `batch_loss` + `class_loss`, summed over `temperatures`, weighted 0.9 beside 0.1 of cross entropy.

    The three levels and the prediction augmentation of the paper, on one view of each image. The authors' runs add a
    second, strongly augmented view and a learning rate of 0.025, over 240 epochs in their released configs and 480 in those
    of logit-standardization-KD. Their released confidence masks, which the reduction before them turns into mere factors,
    are left out.
    """

    ce_weight: float = 0.1
    weight: float = 0.9
    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)

    def __post_init__(self):
        if not self.temperatures:
            raise UserError("temperatures: there are none; give one at least, say (4.0,)")
        for temperature in self.temperatures:
            above_zero(temperatures=temperature)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        s, t = wide(student.logits), wide(teacher.logits)
        instances = sum(kd_loss(s, t, temperature) for temperature in self.temperatures)
        batches = sum(batch_loss(s, t, temperature) for temperature in self.temperatures)
        classes = sum(class_loss(s, t, temperature) for temperature in self.temperatures)
        metrics = {"instance_level": instances, "batch_level": batches, "class_level": classes}
        return instances + batches + classes, metrics
