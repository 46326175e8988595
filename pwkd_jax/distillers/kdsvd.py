"""Self-supervised distillation by singular value decomposition (Lee, Kim and Song, ECCV 2018)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers import decompositions
from pwkd_jax.distillers.feature_maps import Pairs, gram, normalise, same_channels, stage_pairs
from pwkd_jax.distillers.logits import wide
from pwkd_jax.errors import UserError


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def leading(matrix: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The n largest eigenvalues [..., n] of symmetric matrices [..., m, m], and their eigenvectors [..., m, n].

    Values carry no gradient. Those of the vectors stay finite where values coincide, as with dead channels: there
    1 / gap becomes gap / (gap^2 + (1e-5 largest)^2), for a vector within an eigenspace is arbitrary.
    """
    return _leading(matrix, n)[0]


def _leading(matrix: jax.Array, n: int):
    values, vectors = decompositions.eigh(matrix)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    return (values[..., :n], vectors[..., :n]), (values, vectors)


def _leading_backward(n: int, residuals, cotangents):
    (values, vectors), (_, g) = residuals, cotangents
    gap = values[..., None, :n] - values[..., :, None]
    floor = 1e-5 * jnp.max(jnp.abs(values), axis=-1)[..., None, None]
    inverse = gap / (gap**2 + floor**2 + jnp.finfo(gap.dtype).tiny)
    inner = inverse * jnp.einsum("...mi,...mj->...ij", vectors, g, precision="highest")
    g = jnp.einsum("...mi,...ij,...kj->...mk", vectors, inner, vectors[..., :n], precision="highest")
    return (0.5 * (g + jnp.swapaxes(g, -1, -2)),)


leading.defvjp(_leading, _leading_backward)


def right_vectors(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The first n singular values [B, n] and right singular vectors [B, C, n] of maps [B, H, W, C] as [H * W, C] matrices.

    n is at most H * W and C. Vectors whose value is under 1e-3 of the largest are noise, and become zero.
    """
    x = wide(x).reshape(len(x), -1, x.shape[-1])
    pixels_fewer = x.shape[1] < x.shape[2]
    across = x if pixels_fewer else jnp.swapaxes(x, 1, 2)
    values, vectors = leading(gram(across, across), n)
    if pixels_fewer:
        vectors = normalise(jnp.einsum("bpc,bpn->bcn", x, vectors, precision="highest"), axis=1)
    alive = values > 1e-6 * values[:, :1]
    return jnp.sqrt(jnp.maximum(values, 0.0)), vectors * alive[:, None]


def kdsvd_loss(pairs: Pairs, k: int) -> jax.Array:
    """Sum over neighbouring stages of sum((R_s - R_t)^2) / B, R[c, c', j] = exp(-(a[c, j] - b[c', j])^2 / 8); a scalar.

    a, b [B, C, k] of a stage and the next: the teacher's first k right singular vectors, times its singular values
    scaled to length 1; for the student, to each of them, that of its own first k + 3 with the largest |cosine|,
    likewise scaled.
    Signs of singular vectors are arbitrary and the loss depends on them, so each of the teacher's is turned to a sum of
    0 or more, and the student's to a cosine of 0 or more. pairs: maps [B, H, W, C] of each stage, equal in channels.
    """
    loss, before = 0.0, None
    for s, t in pairs:
        most = min(s.shape[-1], s.shape[1] * s.shape[2])
        size, v_t = right_vectors(t, k)
        _, v_s = right_vectors(s, min(k + 3, most))
        v_t = v_t * jnp.where(jnp.sum(v_t, axis=1, keepdims=True) >= 0, 1.0, -1.0)
        cosine = jnp.einsum("bcn,bck->bnk", v_s, v_t, precision="highest")
        best = jnp.argmax(jnp.abs(cosine), axis=1, keepdims=True)
        sign = jnp.where(jnp.take_along_axis(cosine, best, axis=1) >= 0, 1.0, -1.0)
        now = [v * normalise(size)[:, None] for v in (jnp.take_along_axis(v_s, best, axis=2) * sign, v_t)]
        if before is not None:
            r_s, r_t = (jnp.exp(-((b[:, :, None] - a[:, None]) ** 2) / 8) for a, b in zip(before, now, strict=True))
            loss += jnp.sum((r_s - r_t) ** 2) / len(s)
        before = now
    return loss


class KDSVD(nn.Module):
    """`kdsvd_loss` of the stages, at mdistiller's weight, on the [pixels, channels] matrices of the paper.

    Singular vectors over channels are compared entry by entry, so no width but the student's own can teach it.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    k: int = 1

    def __post_init__(self):
        if self.k < 1:
            raise UserError(f"k: {self.k} is not possible; it should be 1 or more")
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        pairs = stage_pairs("KDSVD", student, teacher, stages=2)
        same_channels("KDSVD", "singular vectors over channels", pairs)
        most = min(min(x.shape[-1], x.shape[1] * x.shape[2]) for pair in pairs for x in pair)
        if self.k > most:
            raise UserError(f"student.distiller: KDSVD finds {most} singular vectors in the smallest map: lower k")
        return kdsvd_loss(pairs, self.k), {}
