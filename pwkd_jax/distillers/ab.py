"""Knowledge transfer via distillation of activation boundaries (Heo et al., AAAI 2019, arXiv 1811.03233)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.regressors import ConvReg
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError


def ab_loss(student_map: jax.Array, teacher_map: jax.Array, margin: float) -> jax.Array:
    """Mean over the batch of the sum over pixels and channels of max(0, margin - sign(t) s)^2; a scalar.

    Maps before their ReLU, [B, H, W, C] alike in shape; sign(t) is 1 where t > 0, else -1. Which neurons of the teacher
    fire is all that it says: the student should be a margin away on the same side of zero.
    """
    s, t = wide(student_map), wide(teacher_map)
    short = jnp.maximum(margin - jnp.where(t > 0, s, -s), 0.0)
    return jnp.sum(short**2) / len(s)


class AB(nn.Module):
    """`ab_loss` alone for an initial phase, then cross entropy alone: the two phases of the paper and of RepDistiller.

    Over the stages, the last at weight 1 and each one before at half of the next one's, times 0.003: RepDistiller's
    scale for every CIFAR pair. A weight above 0 keeps the loss beside the cross entropy in the second phase as well.

    connectors: the student's maps pass through a trained convolution and batch norm. RepDistiller leaves these out where
    the shapes agree; a slimmable teacher's agree at one width at most, so here they are there or not for a whole run,
    and false asks for a teacher with the student's own shapes that teaches at its full width alone.
    """

    ce_weight: float = 1.0
    weight: float = 0.0
    margin: float = 1.0
    connectors: bool = True
    initial_epochs: float = 30.0
    initial_each_stage: bool = False

    def __post_init__(self):
        above_zero(margin=self.margin)
        if self.initial_epochs < 0:
            raise UserError(f"initial_epochs: {self.initial_epochs:g} is not possible; it should be 0 or more")
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("AB", student, teacher, "preact")
        counts = len(student.preact), len(teacher.preact)
        if counts[0] != counts[1]:
            raise UserError(
                f"student.distiller: AB compares stages one to one, and the student has {counts[0]}, the teacher "
                f"{counts[1]}: choose models with equally many, or a method that reads the last ones alone (ofd)"
            )
        loss = 0.0
        for i, (s, t) in enumerate(zip(student.preact, teacher.preact, strict=True), start=1):
            if self.connectors:
                s = ConvReg(t.shape[-1], t.shape[1:3], "AB", relu=False, name=f"stage{i}")(wide(s))
            elif s.shape != t.shape:
                raise UserError(
                    f"student.distiller: AB without connectors compares the maps as they are, and stage {i} is "
                    f"{s.shape[1:]} in the student but {t.shape[1:]} in the teacher: set connectors to true"
                )
            loss += 2.0 ** (i - counts[0]) * ab_loss(s, t, self.margin)
        return 0.003 * loss, {}

    def initial(self, student, teacher, batch, progress):
        return self(student, teacher, batch, progress)
