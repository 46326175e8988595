"""Soft targets of a training batch: mixup and CutMix of its images, label smoothing and weights of classes, inside the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixing:
    """(key, images [B, H, W, C] float, labels [B] int) -> (images, targets [B, classes] float, whose rows add up to 1).

    Of one batch image i is mixed with image B - 1 - i, all by one weight map w, 1 where an image keeps its own pixel:
    w x_i + (1 - w) x_j, and the labels by the mean of w. mixup: w is one number from Beta(mixup, mixup) (Zhang et al., ICLR
    2018). cutmix: w is 0 in a box of random place, cut off at the edges, whose sides are sqrt(1 - l) of the image's, l from
    Beta(cutmix, cutmix) (Yun et al., ICCV 2019). chance: of a batch being mixed; switch: of CutMix where both are on.
    smoothing: s moves a label's target from 1 to 1 - s + s / classes, and the others' from 0 to s / classes (Szegedy et al.,
    CVPR 2016). weights: one for each class, () none, see `weigh`. The numbers are of the key alone, whatever the devices.
    Raises UserError for what is not possible.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    chance: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.0
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        bounds = {"mixup": (0, 100), "cutmix": (0, 100), "chance": (0, 1), "switch": (0, 1), "smoothing": (0, 0.999)}
        for name, (low, high) in bounds.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise UserError(f"{name}: {value:g} is not possible; it should be from {low:g} to {high:g}")
        if self.weights and (len(self.weights) != self.num_classes or not all(0 < w < 1e30 for w in self.weights)):
            raise UserError(f"weights: {len(self.weights)} are not possible; give a number above 0 for each of the "
                            f"{self.num_classes} classes")  # fmt: skip

    @property
    def mixes(self) -> bool:
        """Whether images have more than one label."""
        return bool(self.mixup or self.cutmix) and self.chance > 0

    @property
    def changes(self) -> bool:
        """Whether anything is as it would not be without it."""
        return bool(self.mixes or self.smoothing or self.weights)

    def __call__(self, key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        targets = jax.nn.one_hot(labels, self.num_classes)
        targets = (1 - self.smoothing) * targets + self.smoothing / self.num_classes
        if not self.mixes:
            return images, targets
        own = self._weights(key, images.shape[1:3])
        share = jnp.mean(own)
        images = own[..., None] * images + (1 - own[..., None]) * images[::-1]
        return images, share * targets + (1 - share) * targets[::-1]

    def weigh(self, targets: jax.Array) -> jax.Array:
        """Targets [B, classes] times the weight of each class, and so their parts of a cross entropy."""
        return targets * jnp.asarray(self.weights, jnp.float32) if self.weights else targets

    def _weights(self, key: jax.Array, size: tuple[int, int]) -> jax.Array:
        """The weight map [H, W]."""
        whether, which, share, place = jax.random.split(key, 4)
        whole = jnp.ones(size)
        boxed = self.cutmix > 0 if not (self.mixup and self.cutmix) else jax.random.bernoulli(which, self.switch)
        alpha = jnp.where(boxed, self.cutmix, self.mixup)
        share = jax.random.beta(share, alpha, alpha)
        centre = jax.random.uniform(place, (2,)) * jnp.array(size)
        half = jnp.sqrt(1 - share) * jnp.array(size) / 2
        rows, columns = (
            (jnp.arange(n) >= jnp.round(c - h)) & (jnp.arange(n) < jnp.round(c + h))
            for n, c, h in zip(size, centre, half, strict=True)
        )
        box = whole - (rows[:, None] & columns[None])
        return jnp.where(jax.random.bernoulli(whether, self.chance), jnp.where(boxed, box, share * whole), whole)


def balanced(labels: np.ndarray, num_classes: int, strength: float) -> tuple[float, ...]:
    """Weights of classes by how rare they are among labels int [N]: (N / (classes n_c))^strength, scaled so that those of all
    images have the mean 1. strength 1 gives every class the same part of the loss, 0 every image. A class without images has 1.
    """
    count = np.bincount(labels, minlength=num_classes).astype(np.float64)
    weights = np.where(count > 0, (len(labels) / (num_classes * np.maximum(count, 1))) ** strength, 1.0)
    return tuple((weights * len(labels) / np.sum(count * weights)).tolist())
