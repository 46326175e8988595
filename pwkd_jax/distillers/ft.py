"""Paraphrasing complex network: network compression via factor transfer (Kim et al., NeurIPS 2018, arXiv 1802.04977)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.at import attention
from pwkd_jax.distillers.feature_maps import match, normalise
from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError

# A transposed 3x3 convolution of stride 1 is a plain one with its kernel turned, so one kind serves both directions.
Conv = partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=uniform)
activate = partial(nn.leaky_relu, negative_slope=0.1)


def ft_loss(student_factor: jax.Array, teacher_factor: jax.Array) -> jax.Array:
    """Mean over batch and pixels of |a_s - a_t|, a the `attention` at p = 2; maps [B, H, W, C] of any sizes, a scalar.

    The larger map is average-pooled to the smaller one's size. Channels are averaged away, so they need not agree. This
    is RepDistiller's form, and `whole_factor_loss` the authors'.
    """
    s, t = match(wide(student_factor), wide(teacher_factor))
    return jnp.mean(jnp.abs(attention(s, 2.0) - attention(t, 2.0)))


def whole_factor_loss(student_factor: jax.Array, teacher_factor: jax.Array) -> jax.Array:
    """Mean over every element of |f_s - f_t|, each image's factor f scaled to length 1; maps [B, H, W, C], a scalar.

    The larger map is average-pooled to the smaller one's size.
    """
    s, t = (normalise(x.reshape(len(x), -1)) for x in match(wide(student_factor), wide(teacher_factor)))
    return jnp.mean(jnp.abs(s - t))


class Paraphraser(nn.Module):
    """An autoencoder: [B, H, W, C] to its factor [B, H, W, features] and back, three 3x3 convolutions each way."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        channels = x.shape[-1]
        for i, features in enumerate((channels, self.features, self.features), start=1):
            x = activate(Conv(features, name=f"encoder{i}")(x))
        factor = x
        for i, features in enumerate((self.features, channels, channels), start=1):
            x = activate(Conv(features, name=f"decoder{i}")(x))
        return factor, x


class Translator(nn.Module):
    """[B, H, W, C] to a factor [B, H, W, features]: three 3x3 convolutions, each with batch norm, or none at all."""

    features: int
    normed: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, features in enumerate((x.shape[-1], self.features, self.features), start=1):
            x = Conv(features, use_bias=not self.normed, name=f"conv{i}")(x)
            if self.normed:
                x = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name=f"norm{i}")(x)
            x = activate(x)
        return x


class FT(nn.Module):
    """`ft_loss` of the factors of both last maps, at RepDistiller's weight for every CIFAR pair.

    In an initial phase the `Paraphraser` of the teacher's map trains alone, on its mean squared error; afterwards it is
    frozen, and the `Translator` of the student's map trains with the student. A narrow stage uses the paraphraser's
    leading block, which is one that reconstructs only where that stage had an initial phase of its own
    (`initial_each_stage`). ratio: a factor's channels over the teacher's. The metric `reconstruction` is the frozen
    paraphraser's error.

    whole_factors: the authors' own form, `whole_factor_loss` with a translator without batch norm and a paraphraser that
    learns by its mean absolute error; on CIFAR-10 they weigh it 500, after 5 initial epochs.
    """

    ce_weight: float = 1.0
    weight: float = 200.0
    ratio: float = 0.5
    whole_factors: bool = False
    initial_epochs: float = 30.0
    initial_each_stage: bool = False

    def __post_init__(self):
        above_zero(ratio=self.ratio)
        if self.initial_epochs <= 0:
            raise UserError(
                f"initial_epochs: {self.initial_epochs:g} is not possible; it should be above 0, for an untrained "
                "paraphraser has nothing to say"
            )
        super().__post_init__()

    @nn.compact
    def _errors(self, student, teacher, train: bool) -> tuple[jax.Array, jax.Array]:
        """(factor distance, reconstruction error), with the paraphraser in training or frozen."""
        need("FT", student, teacher, "stages")
        s, t = wide(student.stages[-1]), wide(teacher.stages[-1])
        features = max(int(t.shape[-1] * self.ratio), 1)
        paraphraser = Paraphraser(features, name="paraphraser")
        factor, rebuilt = paraphraser(t)
        # A copy kept as state is out of reach of weight decay and momentum, which move even what has no gradient.
        frozen = self.variable("frozen", "weights", lambda: paraphraser.variables["params"])
        if train:
            frozen.value = jax.lax.stop_gradient(paraphraser.variables["params"])
        else:
            factor, rebuilt = Paraphraser(features, parent=None).apply({"params": frozen.value}, t)
        translated = Translator(features, not self.whole_factors, name="translator")(s)
        if self.whole_factors:
            return whole_factor_loss(translated, factor), jnp.mean(jnp.abs(rebuilt - t))
        return ft_loss(translated, factor), jnp.mean((rebuilt - t) ** 2)

    def __call__(self, student, teacher, batch, progress):
        loss, error = self._errors(student, teacher, train=False)
        return loss, {"reconstruction": error}

    def initial(self, student, teacher, batch, progress):
        """The paraphraser's error."""
        return self._errors(student, teacher, train=True)[1], {}
