"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu and Liang, CVPR 2022, arXiv 2203.08679)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import above_zero, chosen, kl, log_binary, log_softmax, ramp
from pwkd_jax.distillers.temperature import TEMPERATURE


def dkd_losses(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """(TCKD, NCKD) of logits [B, C] and labels [B], two scalars, each T^2 times a mean over the batch.

    q = softmax(z / T). TCKD = KL of teacher to student over the pair (q_y, 1 - q_y): how hard is the sample.
    NCKD = KL over the other classes alone, each side renormalised without y: how do the wrong classes rank.
    """
    return tuple(jnp.mean(loss) for loss in each_dkd(student_logits, teacher_logits, labels, temperature))


def each_dkd(student_logits, teacher_logits, labels, temperature: float) -> tuple[jax.Array, jax.Array]:
    """`dkd_losses` of every image, [B] each, rather than their means."""
    label = chosen(labels, student_logits.shape[-1])
    pair = [log_binary(z, label, temperature) for z in (teacher_logits, student_logits)]
    rest = [log_softmax(z, temperature, ~label) for z in (teacher_logits, student_logits)]
    return temperature**2 * kl(*pair), temperature**2 * kl(*rest)


class DKD(nn.Module):
    """`alpha` TCKD + `beta` NCKD beside full cross entropy, fading in over `warmup_epochs` of every stage.

    Defaults as mdistiller has them on CIFAR-100 for resnet32x4 to resnet8x4; beta there is 2 for the plain resnets, 6
    for wrn40-2 to wrn and vgg13 to vgg8, 8 else. On ImageNet T = 1, warm-up 1, beta 0.5 (ResNet-18) or 2 (MobileNetV1).
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = TEMPERATURE
    warmup_epochs: float = 20.0

    def __post_init__(self):
        above_zero(temperature=self.temperature)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        target, others = dkd_losses(student.logits, teacher.logits, batch["label"], self.temperature)
        loss = ramp(progress.epoch, self.warmup_epochs) * (self.alpha * target + self.beta * others)
        return loss, {"target_class": target, "other_classes": others}
