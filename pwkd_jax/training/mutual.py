"""Deep mutual learning: students of one program that learn from each other while they train.

Zhang, Xiang, Hospedales and Lu, CVPR 2018, arXiv 1706.00384, equations 4 to 6 and, for more than two, 8: beside its own loss
each of K students minimises the mean over the others of KL(p_other || p_own). All K read each other's logits of the same step,
as public implementations do, where the paper's algorithm lets one student at a time make its step.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import kl, log_softmax


@dataclasses.dataclass(frozen=True)
class Mutual:
    """weight: of the divergence beside a student's own loss. temperature: of both sides, with its square before the loss."""

    weight: float = 1.0
    temperature: float = 1.0

    def __call__(self, own: jax.Array, everyone: jax.Array) -> jax.Array:
        """The weighted loss, a scalar, of logits `own` [B, classes] towards those of `everyone` [K, B, classes], its own among
        them. Nothing flows back into the latter."""
        taught = log_softmax(jax.lax.stop_gradient(everyone), self.temperature)
        # A student diverges from itself by nothing, and with no gradient: whose index it has need not be known.
        off = jnp.sum(jnp.mean(jax.vmap(lambda t: kl(t, log_softmax(own, self.temperature)))(taught), axis=1))
        return self.weight * self.temperature**2 * off / (len(everyone) - 1)
