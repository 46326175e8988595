"""Cross-layer distillation with semantic calibration (Chen, Mei, Zhang, Wang, Feng and Chen, AAAI 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import gram, match, normalise
from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError


def attention(queries: jax.Array, keys: jax.Array, temperature: float) -> jax.Array:
    """[B, S, T]: softmax over the teacher's T stages of query . key / temperature; [B, S, D] and [B, T, D]."""
    return jax.nn.softmax(gram(queries, keys) / temperature, axis=-1)


def semckd_loss(guesses: list[list[jax.Array]], targets: list[list[jax.Array]], weights: jax.Array) -> jax.Array:
    """1/(B S) * sum over images and stage pairs of w[b, i, j] * mean((guess[i][j][b] - target[i][j][b])^2); a scalar.

    guess[i][j] and target[i][j]: maps [B, H, W, C] of student stage i and teacher stage j, alike in shape;
    weights [B, S, T].
    """
    errors = [
        jnp.stack([jnp.mean((wide(g) - wide(t)) ** 2, axis=(1, 2, 3)) for g, t in zip(*row, strict=True)], axis=-1)
        for row in zip(guesses, targets, strict=True)
    ]
    return jnp.sum(weights * jnp.stack(errors, axis=1)) / (weights.shape[0] * weights.shape[1])


class Embed(nn.Module):
    """[B, ...] features to [B, B/4]: their similarities to the whole batch through a two-layer network, of length 1."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, features = x.reshape(x.shape[0], -1), max(1, x.shape[0] // 4)
        hidden = nn.relu(nn.Dense(2 * features, kernel_init=uniform, name="hidden")(gram(x, x)))
        return normalise(nn.Dense(features, kernel_init=uniform, name="out")(hidden))


class Project(nn.Module):
    """[B, H, W, C] to [B, H, W, features]: 1x1, 3x3 and 1x1 convolutions, batch norm and ReLU between them."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for side in (1, 3):
            x = nn.Conv(2 * self.features, (side, side), padding=side // 2, use_bias=False, kernel_init=uniform)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)(x))
        return nn.Conv(self.features, (1, 1), use_bias=False, kernel_init=uniform)(x)


class SemCKD(nn.Module):
    """`semckd_loss` over every pair of a student's and a teacher's stage, weighted per image by learned attention.

    Every student stage is projected onto every teacher stage, at the smaller of both sizes. The authors train with KD
    beside it: `kd+semckd` at weight 1 each for cross entropy and KD, and 400 here. A query or key is a network whose
    input is an image's similarities to its batch, so the method belongs to one batch size.
    """

    ce_weight: float = 1.0
    weight: float = 400.0
    temperature: float = 1.0

    def __post_init__(self):
        above_zero(temperature=self.temperature)
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("SemCKD", student, teacher, "stages")
        stages, size = [[wide(x) for x in outputs.stages] for outputs in (student, teacher)], student.logits.shape[0]
        if self.has_variable("params", "query1"):
            built = self.variables["params"]["query1"]["hidden"]["kernel"].shape[0]
            if built != size:
                raise UserError(
                    f"student.distiller: SemCKD reads an image's similarities to a batch of {built}, for which it was "
                    f"built, and this batch has {size}: keep the batch size, or train anew with the other"
                )
        queries, keys = (
            jnp.stack([Embed(name=f"{name}{i}")(x) for i, x in enumerate(maps, start=1)], axis=1)
            for name, maps in zip(("query", "key"), stages, strict=True)
        )
        guesses, targets = [], []
        for i, s in enumerate(stages[0], start=1):
            pairs = [match(s, t) for t in stages[1]]
            guesses.append([Project(t.shape[-1], name=f"project{i}_{j}")(x) for j, (x, t) in enumerate(pairs, start=1)])
            targets.append([t for _, t in pairs])
        weights = attention(queries, keys, self.temperature)
        return semckd_loss(guesses, targets, weights), {}
