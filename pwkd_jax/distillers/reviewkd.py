"""Distilling knowledge via knowledge review (Chen, Liu, Zhao and Jia, CVPR 2021, arXiv 2104.09044)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.distillers.feature_maps import adaptive_pool
from pwkd_jax.distillers.logits import above_zero, ramp, wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError

Conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.lecun_uniform())
Norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5)


def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] to [B, *size, C]: pixel i of n is the source's pixel floor(i * source / n), as PyTorch's nearest."""
    for axis, n in enumerate(size, start=1):
        if x.shape[axis] != n:
            x = jnp.take(x, np.arange(n) * x.shape[axis] // n, axis=axis)
    return x


def hcl_loss(student_map: jax.Array, teacher_map: jax.Array) -> jax.Array:
    """Hierarchical context loss of two maps [B, H, W, C] alike in shape; a scalar.

    Weighted mean of the mean squared differences of the maps themselves, weight 1, and of their averages in 4x4, 2x2
    and 1x1 bins, weights 1/2, 1/4, 1/8. Bins that are no coarser than the map are left out, and the next takes their
    weight.
    """
    s, t = wide(student_map), wide(teacher_map)
    loss, weight, total = jnp.mean((s - t) ** 2), 1.0, 1.0
    for bins in (4, 2, 1):
        if bins < min(s.shape[1:3]):
            weight /= 2
            # Pooling is linear: pool the difference.
            loss += weight * jnp.mean(adaptive_pool(s - t, (bins, bins)) ** 2)
            total += weight
    return loss / total


class ABF(nn.Module):
    """Attention based fusion: a stage's map [B, H, W, C] and what the deeper ones left over, [B, H', W', middle].

    Returns (guess at the teacher's map [B, *size, features], left over [B, *size, middle]). The map goes to `middle`
    channels by a 1x1 convolution and batch norm; two sigmoid maps, from a 1x1 convolution of both, weigh it and the
    nearest-resized rest; their sum, nearest-resized to `size`, is left over, and a 3x3 convolution and batch norm of it
    is the guess.
    """

    middle: int
    features: int
    size: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array, deeper: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        x = Norm(name="middle_norm")(Conv(self.middle, (1, 1), name="middle_conv")(x))
        if deeper is not None:
            deeper = nearest(deeper, x.shape[1:3])
            both = jnp.concatenate([x, deeper], axis=-1)
            weights = nn.sigmoid(nn.Conv(2, (1, 1), kernel_init=uniform, name="attention")(both))
            x = x * weights[..., :1] + deeper * weights[..., 1:]
        x = nearest(x, self.size)
        return Norm(name="norm")(Conv(self.features, (3, 3), padding=1, name="conv")(x)), x


class ReviewKD(nn.Module):
    """`hcl_loss` of every stage and of the pooled features (a map of one pixel), fading in over `warmup_epochs`.

    From the deepest down, the student's features are fused with those below (`ABF`) and compared with the teacher's of
    the same level, before their ReLU; sizes and channels follow from the pair. middle: most channels of a fusion, which
    has the student's pooled ones otherwise. student_preact: read the student before its ReLU too, as on ImageNet.

    Default weight: mdistiller's. The authors' scripts have 0.6 for resnet56 to 20, 1 for resnet110 to 32, 5 for
    wrn40-2 to wrn and ShuffleV1 and resnet32x4 to 8x4 and ShuffleV1, 8 for resnet32x4 to ShuffleV2; on ImageNet, where
    the warm-up is 1 epoch, 1 for ResNet-18 and 8 for MobileNetV1.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    warmup_epochs: float = 20.0
    middle: int = 512
    student_preact: bool = False

    def __post_init__(self):
        above_zero(middle=self.middle)
        if self.warmup_epochs < 0:
            raise UserError(f"warmup_epochs: {self.warmup_epochs:g} is not possible; it should be 0 or more")
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        source = "preact" if self.student_preact else "stages"
        need("ReviewKD", student, teacher, "pooled")
        need("ReviewKD", student, student, source)
        if not teacher.preact:
            raise UserError("student.distiller: ReviewKD needs 'preact', which the teacher's model does not return")
        levels = []
        for out, maps in ((student, getattr(student, source)), (teacher, teacher.preact)):
            levels.append([wide(out.pooled)[:, None, None], *(wide(x) for x in reversed(maps))])
        if len(levels[0]) != len(levels[1]):
            raise UserError(
                f"student.distiller: ReviewKD compares stages one to one, and the student has {len(levels[0]) - 1}, the "
                f"teacher {len(levels[1]) - 1}: choose models with equally many, or a method that reads the last ones alone "
                "(ofd)"
            )
        middle = min(self.middle, student.pooled.shape[-1])
        loss, rest = 0.0, None
        for i, (s, t) in enumerate(zip(*levels, strict=True)):
            name = f"stage{len(levels[0]) - i}" if i else "pooled"
            guess, rest = ABF(middle, t.shape[-1], t.shape[1:3], name=name)(s, rest)
            loss += hcl_loss(guess, t)
        return ramp(progress.epoch, self.warmup_epochs) * loss, {}
