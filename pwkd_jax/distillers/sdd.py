"""Scale decoupled distillation (Wei, Luo and Luo, CVPR 2024, arXiv 2403.13512): logits of regions, not of the whole alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.dkd import each_dkd
from pwkd_jax.distillers.feature_maps import adaptive_pool
from pwkd_jax.distillers.heads import classify, map_head
from pwkd_jax.distillers.logits import above_zero, kl, log_softmax, ramp, wide
from pwkd_jax.distillers.taps import need
from pwkd_jax.distillers.temperature import TEMPERATURE
from pwkd_jax.errors import UserError


def region_logits(features: jax.Array, head: tuple[jax.Array, jax.Array], scales: tuple[int, ...]) -> jax.Array:
    """[R, B, classes]: the classifier (kernel [D, classes], bias [classes]) on a map [B, H, W, D] averaged over the whole, then
    over each cell of every grid m x m, m of `scales`; R = 1 + sum of m^2."""
    grids = [adaptive_pool(wide(features), (m, m)).reshape(len(features), m * m, -1) for m in (1, *scales)]
    pooled = jnp.concatenate(grids, axis=1).swapaxes(0, 1)
    return classify(pooled, tuple(wide(x) for x in head))


def region_weights(teacher: jax.Array, labels: jax.Array, complementary: float) -> jax.Array:
    """[R, B] of the teacher's region logits [R, B, classes]: 1 where a region is right or wrong as the whole (region 0) is,
    `complementary` where one of the two is right and the other is not."""
    right = jnp.argmax(teacher, axis=-1) == labels
    return jnp.where(right == right[0], 1.0, complementary)


def sdd_loss(each, student: jax.Array, teacher: jax.Array, labels: jax.Array, complementary: float) -> jax.Array:
    """Mean over regions and images of weight * loss, region logits [R, B, classes] and labels [B] to a scalar.

    each(student [N, classes], teacher [N, classes], labels [N]): the loss of every row, [N].
    """
    weights = region_weights(teacher, labels, complementary)
    rows = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    return jnp.mean(weights.ravel() * each(*rows, jnp.tile(labels, len(student))))


class SDD(nn.Module):
    """`sdd_loss` over KD, at mdistiller's weights for every CIFAR pair.

    scales: the grids beside the whole; (2,) is the authors' for resnet32x4 to resnet8x4 and other pairs of one kind, (2, 4) for
    pairs of two kinds. complementary: theirs is 2. The authors pool coarse grids from the 4x4 one: the same where 4 divides the
    map's sides, while at others, as ImageNet's 7x7, that whole would not be the network's own logits. The regions' logits are
    this method's own, which `student.standardise_logits` does not reach.
    """

    ce_weight: float = 0.1
    weight: float = 0.9
    temperature: float = TEMPERATURE
    scales: tuple[int, ...] = (2,)
    complementary: float = 2.0

    def __post_init__(self):
        _possible(self)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        def each(s, t, labels):
            return self.temperature**2 * kl(*(log_softmax(z, self.temperature) for z in (t, s)))

        regions = _regions("SDD", student, teacher, self.scales)
        return sdd_loss(each, *regions, batch["label"], self.complementary), {}


class SDDDKD(nn.Module):
    """`sdd_loss` over DKD beside full cross entropy, fading in as DKD does; options as there and in `SDD`.

    Defaults are the authors' for resnet32x4 to resnet8x4.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = TEMPERATURE
    warmup_epochs: float = 20.0
    scales: tuple[int, ...] = (2,)
    complementary: float = 2.0

    def __post_init__(self):
        _possible(self)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        def each(s, t, labels):
            target, others = each_dkd(s, t, labels, self.temperature)
            return self.alpha * target + self.beta * others

        regions = _regions("SDD", student, teacher, self.scales)
        loss = sdd_loss(each, *regions, batch["label"], self.complementary)
        return ramp(progress.epoch, self.warmup_epochs) * loss, {}


def _possible(method: nn.Module) -> None:
    above_zero(temperature=method.temperature)
    scales = method.scales
    if not isinstance(scales, tuple) or not scales or not all(type(m) is int and m >= 2 for m in scales):
        raise UserError(f"scales: {scales} is not possible; it should be sides of grids, whole numbers from 2, as (2, 4)")


def _regions(method: str, student, teacher, scales: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    need(method, student, teacher, "final", "head")
    found = []
    for who, outputs in (("student", student), ("teacher", teacher)):
        features, head = map_head(method, who, outputs)
        if max(scales) > min(features.shape[1:3]):
            raise UserError(
                f"student.distiller: {method} takes grids of {max(scales)} cells a side, and the {who}'s last map is "
                f"{features.shape[1]}x{features.shape[2]}: leave that one of 'scales' away, or take larger images"
            )
        found.append(region_logits(features, head, scales))
    return tuple(found)
