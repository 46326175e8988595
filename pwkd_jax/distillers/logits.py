"""Softened class distributions as the logit losses share them: float32 at least, and in log space throughout.

No probability is ever formed and then logged, so a saturated teacher or a bfloat16 student gives no infinity.
"""

import jax
import jax.numpy as jnp

from pwkd_jax.errors import UserError


def above_zero(**fields: float) -> None:
    """UserError naming the first field that is not above 0."""
    for name, value in fields.items():
        if not value > 0:
            raise UserError(f"{name}: {value:g} is not possible; it should be above 0")


def ramp(epoch: jax.Array, length: float) -> jax.Array | float:
    """A linear warm-up, min(epoch / length, 1), of a stage's `epoch`s; always 1 where `length` is 0."""
    return jnp.minimum(epoch / length, 1.0) if length > 0 else 1.0


def wide(x: jax.Array) -> jax.Array:
    """x in float32, or as it is where it is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def chosen(labels: jax.Array, classes: int) -> jax.Array:
    """labels [B] as a mask [B, classes], true at each row's label."""
    return labels[:, None] == jnp.arange(classes)


def _only(z: jax.Array, keep: jax.Array) -> jax.Array:
    # The lowest finite number rather than -inf: its exp is 0 all the same, and neither 0 times it nor a row that keeps
    # nothing makes a nan, in the gradient either.
    return jnp.where(keep, z, jnp.finfo(z.dtype).min)


def log_softmax(logits: jax.Array, temperature=1.0, keep: jax.Array | None = None) -> jax.Array:
    """log softmax(z / T) of [B, C] logits; with a mask `keep` [B, C], over those it keeps.

    The others then hold about the lowest finite number, and a row that keeps none is as if it kept all, equally likely.
    """
    z = wide(logits) / temperature
    return jax.nn.log_softmax(z if keep is None else _only(z, keep))


def log_binary(logits: jax.Array, one: jax.Array, temperature=1.0) -> jax.Array:
    """[B, 2]: log of softmax(z / T) at the class that the mask `one` [B, C] marks, and log of all the others' sum."""
    z = wide(logits) / temperature
    inside, outside = (jax.nn.logsumexp(_only(z, side), axis=-1) for side in (one, ~one))
    # Through the odds: log(1 - p) of a small p would keep few digits as a difference of two logsumexps.
    odds = inside - outside
    return jax.nn.log_sigmoid(jnp.stack([odds, -odds], axis=-1))


def kl(log_t: jax.Array, log_s: jax.Array) -> jax.Array:
    """[B]: sum over classes of t log(t / s), from log probabilities [B, C]; 0 for what `keep` left out of both."""
    return jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
