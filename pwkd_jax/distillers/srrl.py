"""Knowledge distillation via softmax regression representation learning (Yang et al., ICLR 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.heads import teacher_head
from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need


def srrl_losses(guess: jax.Array, pooled: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(feature loss, softmax regression loss): means over every element of (g - p)^2 and of (W'g - W'p)^2; two scalars.

    guess g and the teacher's pooled features p are [B, D], its classifier's kernel W [D, classes]. The classifier's
    bias is in both logits and cancels.
    """
    off = wide(guess) - wide(pooled)
    return jnp.mean(off**2), jnp.mean(jnp.dot(off, wide(kernel), precision="highest") ** 2)


class SRRL(nn.Module):
    """`srrl_losses` of what a trained layer makes of the student's features, seen by the teacher's classifier.

    The layer is linear, batch norm, ReLU. regression_weight: of the second loss beside the first. on_map: the layer works at
    each pixel of the student's `final` map and what it makes is pooled, as the authors have it on ImageNet; else it works on
    the pooled features. The defaults are those of the SimKD benchmark for every CIFAR pair, which adds KD at weight 1
    (`kd+srrl`).
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    regression_weight: float = 1.0
    on_map: bool = False

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("SRRL", student, teacher, "pooled")
        if self.on_map:
            need("SRRL with on_map", student, student, "final")
        target = wide(teacher.pooled)
        kernel, _ = teacher_head("SRRL", teacher, target.shape[-1], "its pooled vector")
        source = wide(student.final if self.on_map else student.pooled)
        guess = nn.Dense(target.shape[-1], use_bias=False, kernel_init=uniform, name="linear")(source)
        guess = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name="norm")(guess))
        if self.on_map:
            guess = jnp.mean(guess, axis=(1, 2))
        feature, regression = srrl_losses(guess, target, kernel)
        return feature + self.regression_weight * regression, {"feature": feature, "regression": regression}
