"""Student-oriented refinement of the teacher's knowledge (Shen, Huang, Zhu, Fan and Zhang, arXiv 2409.18785).

No official code: operations, ranges and weights are those of the authors' public working copy (FabienCode/mdistiller).
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.regressors import ConvReg, uniform
from pwkd_jax.distillers.taps import need

# What an operation's magnitude of 0 and of 1 means: turns in degrees, moves, holes and drops as a fraction.
RANGES = {
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "move_x": (-0.45, 0.45),
    "move_y": (-0.45, 0.45),
    "turn": (-30.0, 30.0),
    "hole": (0.0, 0.2),
    "noise": (0.0, 0.1),
    "shuffle": (0.0, 1.0),
    "drop": (0.0, 0.5),
}
PAIRS = np.array(list(itertools.combinations(range(len(RANGES)), 2)))  # the 36 sub-policies


def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
    """`hard` in value, exactly, and `soft` in gradient."""
    return hard.astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def draw_strengths(key: jax.Array, weights, chances, magnitudes, batch: int, temperature: float = 0.5) -> jax.Array:
    """[batch, 9]: how strongly each operation acts on each image; 0 leaves it alone.

    One sub-policy, drawn by softmax(weights [36]), serves the batch; an image undergoes each of its two operations with
    probability sigmoid(chances [36, 2]), at the place sigmoid(magnitudes [36, 2]) of its range. Both draws are hard, with
    the gradient of their relaxation (Gumbel-softmax and binary concrete) at `temperature`.
    """
    pick, apply = jax.random.split(key)
    soft = jax.nn.softmax((weights + jax.random.gumbel(pick, weights.shape)) / temperature)
    chosen = straight_through(jnp.arange(len(weights)) == jnp.argmax(soft), soft)
    odds = chances + jax.random.logistic(apply, (batch, *chances.shape))
    applied = straight_through(odds > 0, jax.nn.sigmoid(odds / temperature))
    low, high = np.array(list(RANGES.values())).T[:, PAIRS]
    strengths = applied * (low + (high - low) * jax.nn.sigmoid(magnitudes))
    return jnp.einsum("k,bks,kso->bo", chosen, strengths, np.eye(len(RANGES))[PAIRS].astype(np.float32), precision="highest")


def augment(key: jax.Array, x: jax.Array, strengths: jax.Array) -> jax.Array:
    """Feature maps [B, H, W, C] after every operation in the order of RANGES, at strengths [B, 9] each.

    Bilinear, with zeros from outside. A strength of 0 is the identity. Shuffled channels take those of one permutation.
    """
    batch, height, width, channels = x.shape
    s = {name: strengths[:, i, None, None] for i, name in enumerate(RANGES)}
    y, x_ = (jnp.arange(n, dtype=x.dtype) - (n - 1) / 2 for n in (height, width))
    v, u = jnp.meshgrid(2 * y / height, 2 * x_ / width, indexing="ij")
    cos, sin = jnp.cos(jnp.deg2rad(s["turn"])), jnp.sin(jnp.deg2rad(s["turn"]))
    u, v = u + s["shear_x"] * v, v + s["shear_y"] * u
    u, v = cos * u + sin * v + 2 * s["move_x"], cos * v - sin * u + 2 * s["move_y"]
    places = jnp.stack([v * height / 2 + (height - 1) / 2, u * width / 2 + (width - 1) / 2], axis=1)

    def sample(image, place):
        one = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=list(place), order=1, mode="constant")
        return jax.vmap(one, in_axes=-1, out_axes=-1)(image)

    # Computed once: on a pixel's edge, two roundings of one place would disagree on which pixels it lies between.
    out = jax.vmap(sample)(x, jax.lax.optimization_barrier(places))
    holes, noise, shuffles, drops, order = jax.random.split(key, 5)
    covered = 1.0
    for axis, size, where in ((1, height, holes), (2, width, jax.random.fold_in(holes, 1))):
        centre = jax.random.uniform(where, (batch, 1)) * size
        start, half = jnp.arange(size), s["hole"][:, :, 0] * size / 2
        # The part of each pixel that the hole covers, so that its size has a gradient.
        part = jnp.clip(jnp.minimum(start + 1, centre + half) - jnp.maximum(start, centre - half), 0, 1)
        covered *= jnp.expand_dims(part, 3 - axis)
    out = out * (1 - covered[..., None])
    out = out + s["noise"][..., None] * jax.random.normal(noise, out.shape, out.dtype)

    def fraction(key, part):
        edge = jax.random.uniform(key, (batch, 1, channels), out.dtype)
        return straight_through(edge < part, jax.nn.sigmoid((part - edge) / 0.1))[:, :, None]

    out = out + fraction(shuffles, s["shuffle"]) * (out[..., jax.random.permutation(order, channels)] - out)
    return out * (1 - fraction(drops, s["drop"]))


def area_weights(heat: jax.Array, size: jax.Array, offset: jax.Array, areas: int) -> jax.Array:
    """[B, H, W]: how many of the `areas` boxes hold each pixel; without gradient.

    heat [B, H, W, K], peaks of which (3x3) are centres once moved by `offset` (x, y); size (w, h), both [B, H, W, 2].
    """
    heat, size, offset = jax.lax.stop_gradient((heat, size, offset))
    batch, height, width, kinds = heat.shape
    peaks = heat * (heat == nn.max_pool(heat, (3, 3), padding=((1, 1), (1, 1))))
    best = jax.lax.top_k(peaks.reshape(batch, -1), min(areas, height * width * kinds))[1] // kinds
    size, offset = (jnp.take_along_axis(x.reshape(batch, -1, 2), best[..., None], axis=1) for x in (size, offset))
    centre = jnp.stack([best % width, best // width], axis=-1) + offset
    low, high = jnp.floor(centre - size / 2), jnp.floor(centre + size / 2)
    columns, rows = (
        (jnp.arange(n) >= low[..., i, None]) & (jnp.arange(n) <= high[..., i, None]) for i, n in enumerate((width, height))
    )
    return jnp.einsum("bkh,bkw->bhw", rows.astype(heat.dtype), columns.astype(heat.dtype), precision="highest")


def sokd_losses(student, teacher, student_areas, teacher_areas, weights) -> tuple[jax.Array, jax.Array]:
    """(mean of (w * (s - t))^2 over maps [B, H, W, C] with weights [B, H, W], mean of (a_s - a_t)^2 over the area maps)."""
    student, teacher = wide(student), wide(teacher)
    feature = jnp.mean((weights[..., None] * (student - teacher)) ** 2)
    return feature, jnp.mean((wide(student_areas) - wide(teacher_areas)) ** 2)


class Head(nn.Module):
    """3x3 convolution, ReLU, 1x1 convolution to `features`, softplus (the working copy's second ReLU can die for good)."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(x.shape[-1], (3, 3), padding=1, kernel_init=uniform, name="conv1")(x))
        return nn.softplus(nn.Conv(self.features, (1, 1), kernel_init=uniform, name="conv2")(x))


class SoKD(nn.Module):
    """`sokd_losses` between one stage of the student, regressed (`ConvReg`), and the teacher's, augmented (`augment`).

    `kinds` heat-maps (as many as in the working copy, whatever the classes), sizes and offsets of boxes come from heads shared
    by both networks; the feature loss is taken in the student's boxes, and the area loss is between all heads' outputs.
    Weights are for resnet32x4 to resnet8x4.

    Ours, and simpler than the paper's bi-level search: the augmentation's policy descends the student's own loss on the
    same batch, to first order and by the student's optimiser, through straight-through draws instead of a learned
    control variate. The two operations of a sub-policy act in the order of RANGES. The policy learns for the first
    `policy_epochs` of a stage (50, as with FitNet's loss in the working copy), then stays. hint_stage: counted from 1.
    Also ours: whether an operation acts is drawn for every image, not once a batch; a move is by a fraction of the map (the
    working copy's, by that times its pixels, leaves most maps empty); the regressor has one convolution instead of three.
    """

    ce_weight: float = 1.0
    weight: float = 1000.0
    area_weight: float = 1.0
    areas: int = 8
    kinds: int = 100
    hint_stage: int = 2
    policy_epochs: float = 50.0

    def __post_init__(self):
        above_zero(areas=self.areas, kinds=self.kinds, hint_stage=self.hint_stage)
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("SoKD", student, teacher, "stages", stages=self.hint_stage)
        s, t = (wide(x.stages[self.hint_stage - 1]) for x in (student, teacher))
        s = ConvReg(t.shape[-1], t.shape[1:3], "SoKD", name="regressor")(s)
        policy = []
        for name, shape in (("weights", (len(PAIRS),)), ("chances", PAIRS.shape), ("magnitudes", PAIRS.shape)):
            found = self.param(f"policy_{name}", nn.initializers.zeros, shape)
            # A copy is what stays: the parameter itself still feels the optimiser's momentum and weight decay.
            kept = self.variable("policy", name, jnp.zeros, shape)
            policy.append(jnp.where(progress.epoch < self.policy_epochs, found, kept.value))
            if not self.is_initializing():
                kept.value = jax.lax.stop_gradient(policy[-1])
        strengths = draw_strengths(self.make_rng("distiller"), *policy, t.shape[0])
        t = augment(self.make_rng("distiller"), t, strengths)
        heads = [Head(self.kinds if name == "heat" else 2, name=name) for name in ("heat", "size", "offset")]
        both = []
        for x in (s, t):
            heat, size, offset = (head(x) for head in heads)
            both.append((nn.sigmoid(heat), size, offset))
        areas = [jnp.concatenate(x, axis=-1) for x in both]
        feature, area = sokd_losses(s, t, *areas, area_weights(*both[0], self.areas))
        return feature + self.area_weight * area, {"feature": feature, "area": area}
