"""A comprehensive overhaul of feature distillation (Heo et al., ICCV 2019, arXiv 1904.01866)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from pwkd_jax.distillers.feature_maps import match
from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError

FLOOR = 1e-3  # a channel negative less often than this counts as always positive
kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def margins(scale: jax.Array, bias: jax.Array) -> jax.Array:
    """E[x | x < 0] of x ~ N(bias, scale^2): what a channel is on average where it does not fire; [C], [C] to [C].

    bias - |scale| phi(z) / Phi(-z) with z = bias / |scale|, or -3 |scale| where Phi(-z), the chance of a negative x, is
    at most 0.001. scale and bias are those of the batch norm before the ReLU.
    """
    scale, bias = jnp.abs(wide(scale)), wide(bias)
    # A scale of zero is a constant channel: its margin is its bias, or 0 where that is positive.
    z = bias / jnp.maximum(scale, 1e-12)
    negative = norm.cdf(-z)
    return jnp.where(negative > FLOOR, bias - scale * norm.pdf(z) / jnp.maximum(negative, FLOOR), -3.0 * scale)


def ofd_loss(student_map: jax.Array, teacher_map: jax.Array, margin: jax.Array) -> jax.Array:
    """Mean over the batch of the sum over pixels and channels of (s - max(t, margin))^2, the partial distance; a scalar.

    Counted where t > 0 or s > max(t, margin): an inactive neuron need only be below the teacher's, not as far below.
    Maps before their ReLU, [B, H, W, C] alike in shape; margin [C], not positive.
    """
    s, t = wide(student_map), wide(teacher_map)
    target = jnp.maximum(t, wide(margin))
    return jnp.sum(jnp.where((t > 0) | (s > target), (s - target) ** 2, 0.0)) / len(s)


class OFD(nn.Module):
    """`ofd_loss` over the stages, the last at weight 1 and each one before at half of the next one's.

    The student's maps pass through a trained 1x1 convolution and batch norm; the larger map of a stage is
    average-pooled to the smaller one's size before that. Where one model has more stages, its last ones count. The
    margins are those of the teacher's width that is teaching. The authors' teacher normalises by the batch's own statistics;
    here it stays in evaluation mode, as in every method. Default weight: theirs and mdistiller's for every CIFAR pair; 1e-4
    on ImageNet, whose maps are larger.
    """

    ce_weight: float = 1.0
    weight: float = 1e-3

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("OFD", student, teacher, "preact")
        if [len(bias) for _, bias in teacher.norms] != [t.shape[-1] for t in teacher.preact]:
            raise UserError(
                "student.distiller: OFD needs 'norms', the scale and bias of the batch norm before each 'preact' map, which "
                "the teacher's model does not return"
            )
        count, loss = min(len(student.preact), len(teacher.preact)), 0.0
        tail = (x[-count:] for x in (student.preact, teacher.preact, teacher.norms))
        for i, (s, t, normal) in enumerate(zip(*tail, strict=True), start=1):
            s, t = match(wide(s), wide(t))
            s = nn.Conv(t.shape[-1], (1, 1), use_bias=False, kernel_init=kaiming, name=f"stage{i}_conv")(s)
            s = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name=f"stage{i}_norm")(s)
            loss += 2.0 ** (i - count) * ofd_loss(s, t, margins(*normal))
        return loss, {}
