"""Refined logit distillation (Sun, Chen, Lyu, Chen, Chen and Wang, ICCV 2025, arXiv 2408.07703)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import above_zero, chosen, kl, log_binary, log_softmax, ramp
from pwkd_jax.distillers.temperature import TEMPERATURE


def rld_losses(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    confidence_temperature: float,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """(SCD, MCD) of logits [B, C] and labels [B], two scalars, each T^2 times a mean over the batch.

    SCD, sample confidence: KL from (q_t(m), 1 - q_t(m)), m the teacher's own top class, to (q_s(y), 1 - q_s(y)), so
    that a wrong teacher lends its confidence but not its answer. MCD, masked correlation: KL over the classes that the
    teacher ranks strictly below the label, each side renormalised over them; 0 for a sample with fewer than two.
    """
    classes = student_logits.shape[-1]
    label, top = chosen(labels, classes), chosen(jnp.argmax(teacher_logits, axis=-1), classes)
    confidence_t = log_binary(teacher_logits, top, confidence_temperature)
    confidence_s = log_binary(student_logits, label, confidence_temperature)
    below = teacher_logits < jnp.sum(jnp.where(label, teacher_logits, 0), axis=-1, keepdims=True)
    rest_t, rest_s = (log_softmax(z, temperature, below) for z in (teacher_logits, student_logits))
    confidence = confidence_temperature**2 * jnp.mean(kl(confidence_t, confidence_s))
    return confidence, temperature**2 * jnp.mean(kl(rest_t, rest_s))


class RLD(nn.Module):
    """`alpha` SCD + `beta` MCD beside full cross entropy, fading in over `warmup_epochs` of every stage.

    Defaults are the authors' for CIFAR-100, all pairs alike.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    alpha: float = 1.0
    beta: float = 8.0
    confidence_temperature: float = 1.0
    temperature: float = TEMPERATURE
    warmup_epochs: float = 20.0

    def __post_init__(self):
        above_zero(confidence_temperature=self.confidence_temperature, temperature=self.temperature)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        confidence, correlation = rld_losses(
            student.logits, teacher.logits, batch["label"], self.confidence_temperature, self.temperature
        )
        loss = ramp(progress.epoch, self.warmup_epochs) * (self.alpha * confidence + self.beta * correlation)
        return loss, {"sample_confidence": confidence, "masked_correlation": correlation}
