"""Wasserstein distances of logits (WKD-L) and of features (WKD-F) (Lv, Yang and Li, NeurIPS 2024, arXiv 2412.08139)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers import decompositions
from pwkd_jax.distillers.feature_maps import gram, normalise, spans
from pwkd_jax.distillers.logits import above_zero, chosen, log_softmax, wide
from pwkd_jax.distillers.regressors import ConvReg
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError

TINY = 1e-8


def category_costs(kernel: jax.Array, sharpness: float) -> jax.Array:
    """[C, C] cost of moving mass between classes: 1 - exp(-sharpness (1 - cos)), cos of the classifier's columns [D, C]."""
    directions = normalise(wide(kernel).T)
    far = 1 - gram(directions, directions)
    return jax.nn.relu(1 - jnp.exp(-sharpness * far)) + TINY


def transport_cost(
    source: jax.Array, target: jax.Array, held: jax.Array, costs: jax.Array, regularisation: float, iterations: int
) -> jax.Array:
    """[B] sum of flow * costs after `iterations` of Sinkhorn from `source` to `target`, distributions [B, C]; costs [C, C].

    K = exp(-costs / regularisation); v = target / (K'u + 1e-8) and u = source / (Kv + 1e-8) in turn, from u even over the
    classes that the mask `held` [B, C] keeps, the others being 0 on both sides; flow = u K v. Beside a regularisation well
    below costs / 20 the 1e-8 outweighs K, and mass is lost.
    """
    kernel = jnp.exp(-costs / regularisation)

    def turn(pair, _):
        v = target / (gram(pair[0], kernel.T) + TINY)
        return (source / (gram(v, kernel) + TINY), v), None

    even = held / jnp.maximum(jnp.sum(held, axis=-1, keepdims=True), 1).astype(source.dtype)
    (u, v), _ = jax.lax.scan(turn, (even, jnp.zeros_like(even)), length=iterations)
    return jnp.sum(u * gram(v, kernel * costs), axis=-1)


def wkd_logit_losses(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, costs: jax.Array, temperature: float,
    regularisation: float, iterations: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(target, transport): means of -q_t(y) log q_s(y) at T = 1, and of `transport_cost` over the classes other than the label.

    Logits [B, C], labels [B]; transport is from the student's softmax(z / T) without y to the teacher's.
    """
    label = chosen(labels, student_logits.shape[-1])
    q_s, q_t = (log_softmax(z) for z in (student_logits, teacher_logits))
    target = -jnp.mean(jnp.sum(jnp.where(label, jnp.exp(q_t) * q_s, 0.0), axis=-1))
    p_s, p_t = (jnp.where(label, 0.0, jnp.exp(log_softmax(z, temperature, ~label))) for z in (student_logits, teacher_logits))
    return target, jnp.mean(transport_cost(p_s, p_t, ~label, costs, regularisation, iterations))


def gaussian_losses(student: jax.Array, teacher: jax.Array, grid: int, eps: float = 1e-5) -> tuple[jax.Array, jax.Array]:
    """(means, spreads): sums over channels of (difference)^2, means over images and cells; maps [B, H, W, C] alike in shape.

    Every cell of a grid x grid division is a Gaussian of diagonal covariance over its pixels, spread = sqrt(variance + eps)
    with the unbiased variance: their squared Wasserstein distance is the sum of both.
    """
    moments = []
    for x in (wide(student), wide(teacher)):
        windows = [x[:, rows, columns] for rows in spans(x.shape[1], grid) for columns in spans(x.shape[2], grid)]
        spread = jnp.sqrt(jnp.stack([jnp.var(cell, axis=(1, 2), ddof=1) for cell in windows], axis=1) + eps)
        moments.append((jnp.stack([jnp.mean(cell, axis=(1, 2)) for cell in windows], axis=1), spread))
    return tuple(jnp.mean(jnp.sum((s - t) ** 2, axis=-1)) for s, t in zip(*moments, strict=True))


def full_losses(student: jax.Array, teacher: jax.Array, grid: int) -> tuple[jax.Array, jax.Array]:
    """As `gaussian_losses`, of full covariances S and T: spreads are means of tr(S + T - 2 (S^1/2 T S^1/2)^1/2) (Bures).

    With the centred pixels A and B [n, C] of a cell, over sqrt(n - 1), that is |A|^2 + |B|^2 less twice the sum of the
    singular values of A B' [n, n], so that no root of a C x C matrix is taken.
    """
    means, spreads = [], []
    for rows in spans(student.shape[1], grid):
        for columns in spans(student.shape[2], grid):
            cells = [wide(x)[:, rows, columns].reshape(len(x), -1, x.shape[-1]) for x in (student, teacher)]
            centres = [jnp.mean(x, axis=1) for x in cells]
            a, b = ((x - c[:, None]) / (x.shape[1] - 1) ** 0.5 for x, c in zip(cells, centres, strict=True))
            means.append(jnp.sum((centres[0] - centres[1]) ** 2, axis=-1))
            spreads.append(jnp.sum(a**2, axis=(1, 2)) + jnp.sum(b**2, axis=(1, 2)) - 2 * nuclear(gram(a, b)))
    return jnp.mean(jnp.stack(means)), jnp.mean(jnp.stack(spreads))


def nuclear(x: jax.Array) -> jax.Array:
    """[...]: the sum of the singular values of [..., n, n]; no gradient goes by those that are 0 to rounding."""
    fixed = jax.lax.stop_gradient(x)
    u, values, v = decompositions.svd(fixed)
    kept = values > values[..., :1] * values.shape[-1] * jnp.finfo(x.dtype).eps
    polar = jnp.matmul(u * kept[..., None, :], v, precision="highest")
    return jnp.sum(values, axis=-1) + jnp.sum(polar * (x - fixed), axis=(-2, -1))


def fade(epoch: jax.Array, start: float, end: float) -> jax.Array:
    """1 up to epoch `start` of a stage, then half a cosine down to 0 at `end`."""
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((epoch - start) / (end - start), 0, 1)))


class WKDL(nn.Module):
    """target + transport_weight * fade * transport of `wkd_logit_losses`, beside full cross entropy.

    The categories' costs come from the teacher's classifier, the authors' mode "fc", so that they follow its width; their CIFAR
    runs read a file of 1 - CKA of each class's features over the training set instead. Defaults are theirs for resnet32x4 to
    resnet8x4; wrn40-2 to ShuffleV1 has transport_weight 200 and T = 6. They are for 100 classes: among ten each has ten times
    the mass, and 30 is enough. The fade is over a stage's epochs.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    transport_weight: float = 600.0
    temperature: float = 8.0
    sharpness: float = 1.0
    regularisation: float = 0.05
    iterations: int = 10
    fade_start: float = 150.0
    fade_end: float = 240.0

    def __post_init__(self):
        names = ("temperature", "sharpness", "regularisation", "iterations")
        above_zero(**{name: getattr(self, name) for name in names})
        _possible(self)
        super().__post_init__()

    def __call__(self, student, teacher, batch, progress):
        if teacher.head is None:
            raise UserError("student.distiller: WKD-L needs 'head', which the teacher's model does not return")
        target, transport = wkd_logit_losses(
            student.logits, teacher.logits, batch["label"], category_costs(teacher.head[0], self.sharpness), self.temperature,
            self.regularisation, self.iterations,
        )  # fmt: skip
        share = self.transport_weight * fade(progress.epoch, self.fade_start, self.fade_end)
        return target + share * transport, {"target": target, "transport": transport}


class WKDF(nn.Module):
    """fade * (mean_weight * means + spreads) of `gaussian_losses` of the last maps, the student's through `ConvReg`.

    Defaults are the authors' for resnet32x4 to resnet8x4; wrn40-2 to ShuffleV1 has weight 0.3, mean_weight 3 and grid 4. The
    fade is over a stage's epochs. covariance: `full` takes `full_losses`, the paper's other form, which the authors' code does
    not have.
    """

    ce_weight: float = 1.0
    weight: float = 0.08
    mean_weight: float = 4.0
    grid: int = 1
    covariance: str = "diagonal"
    fade_start: float = 150.0
    fade_end: float = 240.0

    def __post_init__(self):
        above_zero(grid=self.grid)
        if self.covariance not in ("diagonal", "full"):
            raise UserError(f"covariance: {self.covariance!r} is not possible; it should be diagonal or full")
        _possible(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("WKD-F", student, teacher, "stages")
        s, t = wide(student.stages[-1]), wide(teacher.stages[-1])
        if self.grid > min(t.shape[1:3]) or -(-t.shape[1] // self.grid) * -(-t.shape[2] // self.grid) < 2:
            raise UserError(
                f"student.distiller: WKD-F takes the spread of each cell's pixels, and a grid of {self.grid} leaves cells of "
                f"one in the teacher's last map of {t.shape[1]}x{t.shape[2]}: take a coarser 'grid', or larger images"
            )
        losses = full_losses if self.covariance == "full" else gaussian_losses
        means, spreads = losses(ConvReg(t.shape[-1], t.shape[1:3], "WKD-F", name="regressor")(s), t, self.grid)
        loss = fade(progress.epoch, self.fade_start, self.fade_end) * (self.mean_weight * means + spreads)
        return loss, {"means": means, "spreads": spreads}


def _possible(method: nn.Module) -> None:
    if not method.fade_end > method.fade_start:
        raise UserError(
            f"fade_end: {method.fade_end:g} is not possible; it should be above fade_start, which is {method.fade_start:g}"
        )
