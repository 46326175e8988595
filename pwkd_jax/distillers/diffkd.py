"""Knowledge diffusion (Huang, Zhang, Zheng, You, Wang, Qian and Xu, NeurIPS 2023, arXiv 2305.15712).

A small diffusion model learns what the teacher's features look like under noise, and takes out of the student's features what
it holds for noise; only then are the two compared.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.distillers.feature_maps import match
from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError

STEPS = 1000
# What is left of the signal's variance after each step of noise, whose own grows from 1e-4 to 0.02.
SIGNAL = np.cumprod(1 - np.linspace(1e-4, 0.02, STEPS, dtype=np.float32), dtype=np.float32)
TIMES = 1280  # rows of the embedding, more than there are steps, as the authors have it

Conv = partial(nn.Conv, kernel_init=uniform)
Norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5)


def noisy(x: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
    """sqrt(a) x + sqrt(1 - a) noise, a the signal left at each image's step; maps [B, H, W, C], times [B] int."""
    left = jnp.asarray(SIGNAL, x.dtype)[times][:, None, None, None]
    return jnp.sqrt(left) * x + jnp.sqrt(1 - left) * noise


def descent(steps: int) -> list[tuple[int, float, float]]:
    """[(time, signal left at it, signal left after it)]: the last `steps` of twice as many strides over all times, down to a
    map without noise."""
    stride = STEPS // (2 * steps)
    times = range((steps - 1) * stride, -1, -stride)
    return [(t, SIGNAL[t], SIGNAL[t - stride] if t >= stride else np.float32(1)) for t in times]


def cleaned(x: jax.Array, find, steps: int) -> jax.Array:
    """x led down `descent`, DDIM without randomness: find(x, times [B]) is the noise held to be in x [B, ...]."""
    for time, left, after in descent(steps):
        noise = find(x, jnp.full(len(x), time))
        clean = (x - (1 - left) ** 0.5 * noise) / left**0.5
        x = after**0.5 * clean + (1 - after) ** 0.5 * noise
    return x


class Layers(nn.Module):
    """Convolutions of (channels, side), batch norm after each and ReLU between them.

    normed: whether the last has batch norm too; otherwise it has a bias.
    """

    sizes: tuple[tuple[int, int], ...]
    normed: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        last = len(self.sizes)
        for i, (channels, side) in enumerate(self.sizes, start=1):
            normed = self.normed or i < last
            x = Conv(channels, (side, side), padding=side // 2, use_bias=not normed, name=f"conv{i}")(x)
            x = Norm(name=f"norm{i}")(x) if normed else x
            x = nn.relu(x) if i < last else x
        return x


def bottleneck(channels: int, reduction: int, name: str) -> Layers:
    middle = max(channels // reduction, 1)
    return Layers(((middle, 1), (middle, 3), (channels, 1)), name=name)


class Noise(nn.Module):
    """The noise in maps [B, H, W, C] at times [B]; `spatial` by two bottlenecks of C / 4 channels, else pixel by pixel, 4 C."""

    spatial: bool

    @nn.compact
    def __call__(self, x: jax.Array, times: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        embedding = self.param("time", nn.initializers.normal(1.0), (TIMES, channels))
        x = x + embedding[times][:, None, None]
        if self.spatial:
            for i in (1, 2):
                x = x + bottleneck(channels, 4, f"block{i}")(x)
            return Layers(((channels, 1),), name="out")(x)
        x = Layers(((4 * channels, 1), (channels, 1)), name="block1")(x)
        return Layers(((4 * channels, 1), (channels, 1)), normed=False, name="block2")(x)


class Share(nn.Module):
    """[B]: how much of a map [B, H, W, C] stays when noise is mixed in, from 0 to 1, learned."""

    spatial: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if self.spatial:
            x = x + bottleneck(channels, 8, "block")(x)
        else:
            x = Layers(((2 * channels, 1), (channels, 1)), name="block")(x)
        return nn.softmax(nn.Dense(2, kernel_init=uniform, name="pick")(jnp.mean(x, axis=(1, 2))))[:, 0]


class Denoise(nn.Module):
    """(refined, target, noise loss, reconstruction loss) of a student's map [B, H, W, S] and a teacher's [B, H, W, T].

    target: the teacher's map, or with `latent` above 0 its encoding of so many channels, which only learns to be decoded (the
    mean squared error of that is the reconstruction loss, 0 without). refined: the student's map, taken to the target's
    channels, mixed with `noise` and led down `steps` (DDIM without randomness), then projected. noise loss: mean squared
    error of the noise found in the target at `times` [B]. noise and target_noise are standard normal of the target's shape.
    """

    spatial: bool
    latent: int
    steps: int

    @nn.compact
    def __call__(self, student, teacher, noise, target_noise, times):
        reconstruction = jnp.zeros((), teacher.dtype)
        target = teacher
        if self.latent:
            code = Norm(name="encoder_norm")(Conv(self.latent, (1, 1), use_bias=False, name="encoder")(teacher))
            decoded = Conv(teacher.shape[-1], (1, 1), name="decoder")(code)
            reconstruction, target = jnp.mean((teacher - decoded) ** 2), jax.lax.stop_gradient(code)
        channels = target.shape[-1]
        find = Noise(self.spatial, name="noise")
        x = Conv(channels, (1, 1), name="align")(student)
        share = Share(self.spatial, name="share")(x)[:, None, None, None]
        x = share * x + (1 - share) * noise
        refined = Conv(channels, (1, 1), use_bias=False, name="project")(cleaned(x, find, self.steps))
        refined = Norm(name="project_norm")(refined)
        error = jnp.mean((find(noisy(target, target_noise, times), times) - target_noise) ** 2)
        return refined, target, error, reconstruction


class DiffKD(nn.Module):
    """Mean squared error of the last maps and KL of the logits, the student's of both refined (`Denoise`), plus their losses.

    All at weight 1 beside full cross entropy. latent: channels of the teacher's encoded map, 0 for half of its own (the
    module's default; 1024 for ResNet-34 to ResNet-18 on ImageNet). steps: of denoising. The authors' code has no setting for
    CIFAR; temperature 1 is theirs for ImageNet. Of two sizes, the larger map is averaged to the smaller.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    latent: int = 0
    steps: int = 5
    temperature: float = 1.0

    def __post_init__(self):
        above_zero(temperature=self.temperature)
        if self.latent < 0:
            raise UserError(f"latent: {self.latent} is not possible; it should be channels, or 0 for half of the teacher's")
        if not 1 <= self.steps <= STEPS // 2:
            raise UserError(f"steps: {self.steps} is not possible; it should be from 1 to {STEPS // 2}")
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("DiffKD", student, teacher, "stages")
        maps = match(wide(student.stages[-1]), wide(teacher.stages[-1]))
        latent = self.latent or max(maps[1].shape[-1] // 2, 1)
        logits = [wide(x.logits)[:, None, None] for x in (student, teacher)]
        refined, target, map_noise, reconstruction = self._denoise("map", *maps, latent)
        guess, taught, logit_noise, _ = self._denoise("logits", *logits, 0)
        feature = jnp.mean((refined - target) ** 2)
        kd = kd_loss(guess[:, 0, 0], taught[:, 0, 0], self.temperature)
        losses = {"feature": feature, "logits": kd, "noise": map_noise + logit_noise, "reconstruction": reconstruction}
        return sum(losses.values()), losses

    def _denoise(self, name: str, student, teacher, latent: int):
        shape = (*teacher.shape[:-1], latent or teacher.shape[-1])
        noises = [jax.random.normal(self.make_rng("distiller"), shape, teacher.dtype) for _ in range(2)]
        times = jax.random.randint(self.make_rng("distiller"), (len(teacher),), 0, STEPS)
        return Denoise(name == "map", latent, self.steps, name=name)(student, teacher, *noises, times)
