"""FitNets: hints for thin deep nets (Romero et al., ICLR 2015, arXiv 1412.6550)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.regressors import ConvReg
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError


def hint_loss(guess: jax.Array, hint: jax.Array) -> jax.Array:
    """Mean over every element of (guess - hint)^2; two maps [B, H, W, C] alike in shape, gives a scalar."""
    return jnp.mean((wide(guess) - wide(hint)) ** 2)


class FitNet(nn.Module):
    """`hint_loss` between one stage of the teacher and a trained regression (`ConvReg`) from the student's same stage.

    In one phase, beside the cross entropy throughout, at RepDistiller's and mdistiller's weight for every CIFAR pair;
    the paper trained up to the hint first. hint_stage: counted from 1.
    """

    ce_weight: float = 1.0
    weight: float = 100.0
    hint_stage: int = 2

    def __post_init__(self):
        if self.hint_stage < 1:
            raise UserError(f"hint_stage: {self.hint_stage} is not possible; stages count from 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("FitNet", student, teacher, "stages", stages=self.hint_stage)
        s, t = (wide(x.stages[self.hint_stage - 1]) for x in (student, teacher))
        guess = ConvReg(t.shape[-1], t.shape[1:3], "FitNet", name="regressor")(s)
        return hint_loss(guess, t), {}
