"""Knowledge distillation with the reused teacher classifier (Chen et al., CVPR 2022, arXiv 2203.14001)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax import slimmable
from pwkd_jax.distillers.feature_maps import match
from pwkd_jax.distillers.heads import classify, teacher_head
from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need

Conv = partial(nn.Conv, use_bias=False, kernel_init=uniform)


def simkd_loss(projected: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over every element of (projected - target)^2; two maps [B, H, W, C] alike in shape, gives a scalar."""
    return jnp.mean((wide(projected) - wide(target)) ** 2)


class Projector(nn.Module):
    """[B, H, W, C] to [B, H, W, features]: 1x1, 3x3 and 1x1 convolutions, each with batch norm and ReLU.

    The first two have `features / factor` channels. train: whether batch norm uses the batch, or its running statistics.
    """

    features: int
    factor: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        # At least one, so that a very narrow teacher still has a path.
        middle = max(self.features // self.factor, 1)
        for i, (features, window) in enumerate(((middle, 1), (middle, 3), (self.features, 1)), start=1):
            x = Conv(features, (window, window), padding=window // 2, name=f"conv{i}")(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=f"norm{i}")
            x = nn.relu(norm(x))
        return x


class SimKD(nn.Module):
    """`simkd_loss` alone, of a trained projection of the student's `final` map to the teacher's; no label is learned from.

    What predicts is the teacher's classifier on that projection (`predict`), the student's own classifier being left
    untrained. The larger map is average-pooled to the smaller one's size. Weights and factor as the authors have them
    for every CIFAR pair. The metric `predicted_cross_entropy` is that of those predictions on the training batch.
    """

    ce_weight: float = 0.0
    weight: float = 1.0
    factor: int = 2

    def __post_init__(self):
        above_zero(factor=self.factor)
        super().__post_init__()

    @nn.compact
    def _project(self, student, teacher, train: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(projected map, the teacher's at the same size, logits)."""
        need("SimKD", student, teacher, "final")
        s, t = match(wide(student.final), wide(teacher.final))
        head = teacher_head("SimKD", teacher, t.shape[-1], "its last map")
        projected = Projector(t.shape[-1], self.factor, name="projector")(s, train)
        return projected, t, classify(jnp.mean(projected, axis=(1, 2)), head)

    def __call__(self, student, teacher, batch, progress):
        projected, target, logits = self._project(student, teacher, train=True)
        labels = batch["target"] if "target" in batch else batch["label"]
        metrics = {"predicted_cross_entropy": slimmable.cross_entropy(logits, labels)}
        return simkd_loss(projected, target), metrics

    def predict(self, student, teacher) -> jax.Array:
        """Logits [B, classes], by the running statistics of batch norm: an image's do not depend on its neighbours."""
        return self._project(student, teacher, train=False)[2]
