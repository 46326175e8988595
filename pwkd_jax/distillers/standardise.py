"""Logit standardisation (Sun, Ren, Li, Wang and Cao, CVPR 2024, arXiv 2403.01693): z-scores before any logit loss."""

import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import wide

EPS = 1e-7


def standardise(logits: jax.Array) -> jax.Array:
    """(z - mean(z)) / (std(z) + 1e-7) over the classes of each row; [B, C] to [B, C], in float32 at least.

    The standard deviation is the unbiased one (ddof 1, two classes at least). The gradient passes through it and the
    mean, so that a student is told which classes lead, not how large its logits are. With `kd_loss` on the result of
    both sides the paper's CIFAR setting is T = 2, weight 9 and 0.1 of cross entropy; DKD has T = 2 and 9 times its alpha and
    beta. The authors' multi-level distillation standardises in its level of single images alone.
    """
    z = wide(logits)
    centred = z - jnp.mean(z, axis=-1, keepdims=True)
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / (z.shape[-1] - 1)
    # A row of equal logits has variance 0, where the root's slope is infinite: take its gradient to be 0 there.
    spread = variance > 0
    std = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)
    return centred / (std + EPS)
