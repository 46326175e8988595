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
    """`srrl_losses` of what a trained layer makes of the student's pooled features, seen by the teacher's classifier.

    The layer is linear, batch norm, ReLU. regression_weight: of the second loss beside the first. The defaults are
    those of the SimKD benchmark for every CIFAR pair, which adds KD at weight 1 (`kd+srrl`).
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    regression_weight: float = 1.0

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("SRRL", student, teacher, "pooled")
        target = wide(teacher.pooled)
        kernel, _ = teacher_head("SRRL", teacher, target.shape[-1], "its pooled vector")
        guess = nn.Dense(target.shape[-1], use_bias=False, kernel_init=uniform, name="linear")(wide(student.pooled))
        guess = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name="norm")(guess)
        feature, regression = srrl_losses(nn.relu(guess), target, kernel)
        return feature + self.regression_weight * regression, {"feature": feature, "regression": regression}
