"""Student-friendly knowledge distillation, as we read its abstract (Yuan, Lang and Quan, arXiv 2305.10893).

The abstract: the teacher's logits are softened by a temperature, an attention-based "learning simplifier" turns them
into easier ones, it is trained jointly with the student by the distillation loss, and the form of that loss stays as it
is. The shape of the attention, the temperature and the weights are not in it and there is no public code: those here
are ours, and no number of the paper should be expected of them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import above_zero, kl, log_softmax, wide
from pwkd_jax.distillers.temperature import TEMPERATURE


def simplify(softened: jax.Array, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """(x + A x) / 2 with A = softmax(queries keys' / sqrt(D)) [B, B]; x [B, C], queries and keys [B, D], gives [B, C].

    A row of A is a set of weights, so a target is half its own answer and half a mean of the batch's answers: however
    A is trained, the teacher cannot be simplified away.
    """
    attention = jax.nn.softmax(queries @ keys.T / queries.shape[-1] ** 0.5)
    return (softened + attention @ softened) / 2


class StudentFriendly(nn.Module):
    """KD towards the teacher's softened logits, simplified by attention over the batch; weights and T are KD's."""

    ce_weight: float = 0.1
    weight: float = 0.9
    temperature: float = TEMPERATURE
    features: int = 64

    def __post_init__(self):
        above_zero(temperature=self.temperature, features=self.features)
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        softened = wide(teacher.logits) / self.temperature
        # Logits are the same up to a constant a row; the projections should not see it.
        softened -= jnp.mean(softened, axis=-1, keepdims=True)
        queries, keys = (nn.Dense(self.features, name=name)(softened) for name in ("queries", "keys"))
        target = log_softmax(simplify(softened, queries, keys))
        loss = self.temperature**2 * jnp.mean(kl(target, log_softmax(student.logits, self.temperature)))
        return loss, {"target_entropy": -jnp.mean(jnp.sum(jnp.exp(target) * target, axis=-1))}
