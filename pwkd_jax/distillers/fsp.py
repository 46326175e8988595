"""A gift from knowledge distillation: the flow of solution procedure (Yim et al., CVPR 2017)."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import match, same_channels, stage_pairs
from pwkd_jax.distillers.logits import wide
from pwkd_jax.errors import UserError


def flow(before: jax.Array, after: jax.Array) -> jax.Array:
    """[B, H, W, C] and [B, H', W', C'] to [B, C, C']: mean over pixels of the products of their channels.

    The larger map is average-pooled to the smaller one's size.
    """
    before, after = match(wide(before), wide(after))
    pixels = before.shape[1] * before.shape[2]
    return jnp.einsum("bhwc,bhwd->bcd", before, after, precision="highest") / pixels


def fsp_loss(student_maps: list[jax.Array], teacher_maps: list[jax.Array]) -> jax.Array:
    """Sum over neighbouring stages of the mean of (G_s - G_t)^2, G the `flow`; a scalar.

    Lists of maps [B, H, W, C], equal in number and, stage by stage, in channels.
    """
    flows = ([flow(*two) for two in itertools.pairwise(maps)] for maps in (student_maps, teacher_maps))
    return sum(jnp.mean((s - t) ** 2) for s, t in zip(*flows, strict=True))


class FSP(nn.Module):
    """`fsp_loss` alone for an initial phase, then cross entropy alone: the two phases of the paper and of RepDistiller.

    Over the stages, and from the stem, as RepDistiller does, where both models give one of equal channels. A weight above 0
    keeps the loss beside the cross entropy in the second phase as well. The products that it compares are of channels, so no
    width but the student's own can teach it.
    """

    ce_weight: float = 1.0
    weight: float = 0.0
    initial_epochs: float = 30.0
    initial_each_stage: bool = False

    def __post_init__(self):
        if self.initial_epochs < 0:
            raise UserError(f"initial_epochs: {self.initial_epochs:g} is not possible; it should be 0 or more")
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        pairs = stage_pairs("FSP", student, teacher, stages=2)
        same_channels("FSP", "products of neighbouring stages' channels", pairs)
        stems = student.stem, teacher.stem
        if all(stem is not None for stem in stems) and stems[0].shape[-1] == stems[1].shape[-1]:
            pairs = [stems, *pairs]
        return fsp_loss(*zip(*pairs, strict=True)), {}

    def initial(self, student, teacher, batch, progress):
        return self(student, teacher, batch, progress)
