"""NORM: N-to-one representation matching (Liu, Li, Li and Yao, ICLR 2023, arXiv 2305.13803)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax import slimmable
from pwkd_jax.distillers.heads import classify, map_head
from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.taps import need
from pwkd_jax.distillers.temperature import TEMPERATURE
from pwkd_jax.errors import UserError

kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def norm_loss(parts: jax.Array, teacher: jax.Array) -> jax.Array:
    """Sum over the N parts of the mean of (part - teacher)^2; parts [B, H, W, N, C] and the teacher's map [B, H, W, C]."""
    return jnp.mean((wide(parts) - wide(teacher)[..., None, :]) ** 2) * parts.shape[-2]


def level(logits: jax.Array, scale: float) -> jax.Array:
    """Logits [B, C] with mean 0 and standard deviation `scale` in every row: layer norm, eps 1e-7, times scale."""
    z = wide(logits)
    off = z - jnp.mean(z, axis=-1, keepdims=True)
    return scale * off * jax.lax.rsqrt(jnp.mean(off**2, axis=-1, keepdims=True) + 1e-7)


def max_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """x [B, H, W, ...] to [B, *size, ...], sides a multiple of `size`: the largest of each window."""
    (h, w), rest = (n // m for n, m in zip(x.shape[1:3], size, strict=True)), x.shape[3:]
    return jnp.max(x.reshape(len(x), size[0], h, size[1], w, *rest), axis=(2, 4))


class Transform(nn.Module):
    """(parts [B, H, W, N, channels], map [B, H, W, D]) of a map [B, H, W, D]: a 1x1 convolution to N times the teacher's
    channels and one back, each with batch norm and without ReLU, added to the map.

    Linear where batch norm uses running statistics (not `train`), and could then be merged with the classifier.
    """

    parts: int
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        # Of several axes, the teacher's channels last, so that a stage uses the leading ones of every part.
        expand = nn.DenseGeneral((self.parts, self.channels), use_bias=False, kernel_init=kaiming, name="expand")
        contract = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, kernel_init=kaiming, name="contract")
        norms = [
            nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, axis=axis, name=f"{name}_norm")
            for name, axis in (("expand", (-2, -1)), ("contract", -1))
        ]
        parts = norms[0](expand(x))
        return parts, x + norms[1](contract(parts))


class NORM(nn.Module):
    """norm_weight * `norm_loss` + label_weight * cross entropy + kd_weight * KD, all of the student with a `Transform`.

    The transform lies between the student's `final` map and its classifier and belongs to what predicts (`predict`). Logits of
    both networks are first brought to standard deviation 2.5 (`level`), as in the authors' code. norm_weight is theirs,
    x 0.1 below epoch 10 of a stage, x 0.5 below 20 and from 180, x 0.1 from 210. The larger map is max-pooled to the other.

    Defaults: resnet32x4 to resnet8x4 as in the authors' example, without KD; they search label_weight over 1/16 to 1/2, and
    NORM+KD has kd_weight above 0.
    """

    ce_weight: float = 0.0
    weight: float = 1.0
    parts: int = 8
    norm_weight: float = 1.0
    label_weight: float = 0.1
    kd_weight: float = 0.0
    temperature: float = TEMPERATURE
    scale: float = 2.5

    def __post_init__(self):
        above_zero(parts=self.parts, temperature=self.temperature, scale=self.scale)
        super().__post_init__()

    @nn.compact
    def _transformed(self, student, teacher, train: bool) -> tuple[jax.Array, jax.Array]:
        """(parts, logits)."""
        need("NORM", student, teacher, "final", "head")
        features, head = map_head("NORM", "student", student)
        transform = Transform(self.parts, teacher.final.shape[-1], name="transform")
        parts, features = transform(wide(features), train)
        return parts, classify(jnp.mean(features, axis=(1, 2)), tuple(wide(x) for x in head))

    def __call__(self, student, teacher, batch, progress):
        parts, logits = self._transformed(student, teacher, True)
        target = wide(teacher.final)
        size = tuple(min(n) for n in zip(parts.shape[1:3], target.shape[1:3], strict=True))
        if any(n % m for x in (parts, target) for n, m in zip(x.shape[1:3], size, strict=True)):
            raise UserError(
                f"student.distiller: NORM max-pools the larger last map to the other's size, and {parts.shape[1:3]} of the "
                f"student and {target.shape[1:3]} of the teacher are no multiples: choose models of equal strides"
            )
        feature = norm_loss(max_pool(parts, size), max_pool(target, size))
        own, taught = (level(z, self.scale) for z in (logits, teacher.logits))
        ce = jnp.mean(slimmable.cross_entropy(own, batch["target"] if "target" in batch else batch["label"]))
        kd = kd_loss(own, taught, self.temperature)
        epoch = progress.epoch
        share = jnp.select([epoch < 10, epoch < 20, epoch < 180, epoch < 210], [0.1, 0.5, 1.0, 0.5], 0.1)
        loss = self.norm_weight * share * feature + self.label_weight * ce + self.kd_weight * kd
        return loss, {"feature": feature, "predicted_cross_entropy": ce, "logits": kd}

    def predict(self, student, teacher) -> jax.Array:
        """Levelled logits [B, classes] with the transform, by running statistics: an image's do not depend on the others."""
        return level(self._transformed(student, teacher, False)[1], self.scale)
