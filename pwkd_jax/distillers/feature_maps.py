"""What feature distillers share: pairing the stages of two models, bringing maps to one size, and lengths.

Products over the batch are taken at full float32 precision everywhere: their differences are what is learned from, and
accelerators round them to ten bits or fewer by default.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.distillers.logits import wide
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError
from pwkd_jax.models import Outputs

Pairs = list[tuple[jax.Array, jax.Array]]


def stage_pairs(method: str, student: Outputs, teacher: Outputs, stages: int = 1) -> Pairs:
    """[(student's map, teacher's map)] for every stage, in float32 at least.

    Raises UserError where either has fewer than `stages` of them, or the two have not equally many.
    """
    need(method, student, teacher, "stages", stages=stages)
    counts = len(student.stages), len(teacher.stages)
    if counts[0] != counts[1]:
        raise UserError(
            f"student.distiller: {method} compares stages one to one, and the student has {counts[0]}, the teacher "
            f"{counts[1]}: choose models with equally many, or a method that reads the last features alone (sp, pkt)"
        )
    return [(wide(s), wide(t)) for s, t in zip(student.stages, teacher.stages, strict=True)]


def same_channels(method: str, what: str, pairs: Pairs) -> None:
    """UserError, by the first stage concerned, unless the maps of each pair have equally many channels."""
    for i, (s, t) in enumerate(pairs, start=1):
        if s.shape[-1] != t.shape[-1]:
            raise UserError(
                f"student.distiller: {method} compares {what}, and stage {i} has {s.shape[-1]} channels in the student "
                f"but {t.shape[-1]} in the teacher: it serves only a teacher with the student's own channels that "
                "teaches at its full width alone"
            )


def spans(size: int, bins: int) -> list[slice]:
    """Where the bins of `size` pixels lie: bin i covers floor(i * size / bins) up to ceil((i + 1) * size / bins)."""
    return [slice(i * size // bins, -((i + 1) * -size // bins)) for i in range(bins)]


def _bins(size: int, bins: int) -> np.ndarray:
    """[bins, size] averaging matrix of `spans`."""
    inside = np.zeros((bins, size), bool)
    for row, span in zip(inside, spans(size, bins), strict=True):
        row[span] = True
    return inside / inside.sum(axis=1, keepdims=True)


def adaptive_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] averaged to [B, *size, C], sizes that do not divide included (bins then overlap, as in PyTorch)."""
    if x.shape[1:3] == tuple(size):
        return x
    rows, columns = (jnp.asarray(_bins(n, m), x.dtype) for n, m in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("hi,wj,bijc->bhwc", rows, columns, x, precision="highest")


def match(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both maps at the smaller height and the smaller width of the two."""
    size = tuple(min(n) for n in zip(a.shape[1:3], b.shape[1:3], strict=True))
    return adaptive_pool(a, size), adaptive_pool(b, size)


def normalise(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """x over its l2 norm along `axis`; what is shorter than 1e-12 becomes zero, with a gradient of zero."""
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    alive = square > 1e-24
    return x * jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, square, 1.0)), 0.0)


def gram(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b': inner products of the rows of [..., n, d] and [..., m, d], [..., n, m]."""
    return jnp.einsum("...nd,...md->...nm", a, b, precision="highest")
