"""ScaleKD (Fan, Li, Liu and Yao, NeurIPS 2024, arXiv 2411.06786): a large vision transformer teaches any network.

A cross-attention projector (CAP) takes the student's map to the teacher's form, dual-view feature mimicking (DFM) compares it
as it is and without its mean, and teacher parameter perception (TPP) sends it through the teacher's own last stage first.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import normalise
from pwkd_jax.distillers.logits import above_zero, log_softmax, wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need, network
from pwkd_jax.errors import UserError

Dense = partial(nn.Dense, kernel_init=uniform)


def alike(found: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over images of sum |f / |f| - t / |t||^2 over pixels; vectors f and t along the channels of maps [B, H, W, C]."""
    return jnp.mean(jnp.sum((normalise(found) - normalise(target)) ** 2, axis=(1, 2, 3)))


def without_mean(x: jax.Array) -> jax.Array:
    """A map [B, H, W, C] less its mean over pixels: without the lowest frequency of its cosine transform."""
    return x - jnp.mean(x, axis=(1, 2), keepdims=True)


class Projector(nn.Module):
    """CAP: a student's map [B, H, W, S] as the teacher's form, tokens [B, N, features].

    Queries [B or 1, N, features] of the teacher's form, learned ones by default, attend to the student's pixels, which have
    passed a convolution and have learned positions; then LayerNorm and an MLP, both of whose parts are added up. Heads are of
    `head_features` channels or a little more, so many as divide the channels evenly; their products are 5 times as sharp.
    """

    features: int
    size: tuple[int, int]
    head_features: int
    own_queries: bool

    @nn.compact
    def __call__(self, x: jax.Array, queries: jax.Array | None = None) -> jax.Array:
        batch, height, width, channels = x.shape
        if self.own_queries:
            shape = (1, self.size[0] * self.size[1], self.features)
            queries = self.param("query", nn.initializers.normal(1.0), shape)
        # Neither this bias nor that of the keys would change anything.
        x = nn.Conv(channels, (3, 3), padding=1, use_bias=False, kernel_init=uniform, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name="norm")(x))
        x = x + self.param("position", nn.initializers.truncated_normal(0.02), (1, height, width, channels))
        x = x.reshape(batch, height * width, channels)
        queries = nn.relu(Dense(self.features, name="ask")(queries))
        count = heads(self.features, self.head_features)
        query, key, value = (
            Dense(self.features, use_bias=name != "attend_key", name=name)(of).reshape(*of.shape[:2], count, -1)
            for name, of in (("attend_query", queries), ("attend_key", x), ("attend_value", x))
        )
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        products = jnp.einsum("bnhd,bmhd->bhnm", query, key, precision="highest")
        shares = jax.nn.softmax(5 * products * (self.features // count) ** -0.5)
        found = jnp.einsum("bhnm,bmhd->bnhd", shares, value, precision="highest").reshape(batch, -1, self.features)
        found = Dense(self.features, name="attend_out")(found)
        found = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="layer_norm")(found)
        hidden = nn.relu(Dense(4 * self.features, name="mlp1")(found))
        return found + Dense(self.features, name="mlp2")(hidden)


def heads(features: int, head_features: int) -> int:
    """How many heads, each of `head_features` at least, divide so many features; 1 of fewer."""
    return next((n for n in range(features // head_features, 1, -1) if features % n == 0), 1)


class ScaleKD(nn.Module):
    """kd_weight * cross entropy to the teacher + spatial and frequency times `alike` of the last two stages, beside labels.

    Each view, the map itself and the map `without_mean`, has projectors of its own. What the next-to-last stage becomes goes
    through the teacher's last stage, is compared with the teacher's last map, and asks the questions of the last stage's
    projector. Defaults are the authors' for Swin-L to ResNet-50, whose heads have 48 and 64 channels. Any teacher that can go
    on from a stage's map will do (`models.again`); theirs that are transformers without stages have their last block after
    the last stage's projector too.
    """

    ce_weight: float = 0.5
    weight: float = 1.0
    kd_weight: float = 0.5
    temperature: float = 1.0
    spatial: float = 0.08
    frequency: float = 0.06
    head_features: int = 64
    reruns = True

    def __post_init__(self):
        above_zero(temperature=self.temperature, head_features=self.head_features)
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("ScaleKD", student, teacher, "stages", stages=2)
        itself = network("ScaleKD", "teacher", teacher, resumes=True)
        (third, fourth), (like, target) = ([wide(x) for x in out.stages[-2:]] for out in (student, teacher))
        if target.shape[1] * target.shape[2] < 2:
            raise UserError(
                "student.distiller: ScaleKD compares maps without their mean, and the teacher's last one is a single pixel; "
                "give larger images"
            )
        losses = {}
        for name, weight, view in (("spatial", self.spatial, lambda x: x), ("frequency", self.frequency, without_mean)):
            tokens = self._projector(f"{name}_before", like, True)(third)
            seen = wide(itself(tokens.reshape(len(tokens), *like.shape[1:]), start=len(teacher.stages) - 1).stages[-1])
            tokens = self._projector(f"{name}_last", target, False)(fourth, seen.reshape(len(seen), -1, seen.shape[-1]))
            losses[name] = sum(alike(view(x), view(target)) for x in (seen, tokens.reshape(target.shape)))
            losses[name] = weight * losses[name]
        log_s, log_t = (log_softmax(x.logits, self.temperature) for x in (student, teacher))
        kd = self.temperature**2 * -jnp.mean(jnp.sum(jnp.exp(log_t) * log_s, axis=-1))
        return self.kd_weight * kd + sum(losses.values()), {"soft_cross_entropy": kd, **losses}

    def _projector(self, name: str, like: jax.Array, own_queries: bool) -> Projector:
        return Projector(like.shape[-1], like.shape[1:3], self.head_features, own_queries, name=name)
