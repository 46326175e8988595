"""The frozen teacher's classifier, as the methods use it that hand it the student's features."""

import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import wide
from pwkd_jax.errors import UserError
from pwkd_jax.models import Outputs


def teacher_head(method: str, teacher: Outputs, features: int, what: str) -> tuple[jax.Array, jax.Array]:
    """(kernel [features, classes], bias [classes]) of the teacher's classifier, in float32 at least.

    Raises UserError where the model does not return it, or it reads another number of features than `what` has.
    """
    if teacher.head is None:
        raise UserError(f"student.distiller: {method} needs 'head', which the teacher's model does not return")
    kernel, bias = teacher.head
    if kernel.shape[0] != features:
        raise UserError(
            f"student.distiller: {method} puts features like {what} through the teacher's classifier, which reads "
            f"{kernel.shape[0]} where {what} has {features} channels: choose a teacher whose classifier reads {what}"
        )
    return wide(kernel), wide(bias)


def classify(features: jax.Array, head: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Logits [B, classes] that the classifier `head` (kernel, bias) gives to features [B, D]."""
    return jnp.dot(features, head[0], precision="highest") + head[1]
