"""A network's classifier: the frozen teacher's on the student's features, and either's own on single pixels of its map."""

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


def map_head(method: str, who: str, outputs: Outputs) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(final map [B, H, W, D], (kernel [D, classes], bias [classes])) of one network, as the model gives them.

    Raises UserError where its classifier reads another number of features than the map has.
    """
    features, head = outputs.final, outputs.head
    if features.shape[-1] != head[0].shape[0]:
        raise UserError(
            f"student.distiller: {method} applies the classifier to each pixel of 'final', and the {who}'s reads "
            f"{head[0].shape[0]} features where that map has {features.shape[-1]}: 'final' should be the map whose "
            "mean over pixels is 'pooled'"
        )
    return features, head


def classify(features: jax.Array, head: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Logits [..., classes] that the classifier `head` (kernel, bias) gives to features [..., D]."""
    return jnp.dot(features, head[0], precision="highest") + head[1]
