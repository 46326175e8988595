"""Colour jitter, blur and random erasing of a batch inside the jitted step. Image i's numbers are of (key, i) alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SIGMAS = (0.1, 2.0)  # pixels; SimCLR (Chen et al., ICML 2020)
AREAS, RATIOS = (0.02, 1 / 3), (0.3, 3.3)  # of what is erased; Zhong et al., AAAI 2020


def _each(key: jax.Array, count: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def _bytes(images: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)


def jitter(key: jax.Array, images: jax.Array, strengths: Sequence[float]) -> jax.Array:
    """uint8 [B, H, W, C], each with brightness, contrast, saturation and hue changed, in this order.

    strengths: (brightness, contrast, saturation, hue): of the first three, s means a factor drawn from [1 - s, 1 + s], by which
    the image is moved away from black, from its mean grey and from its own grey; of hue, a turn drawn from [-s, s], 1 being the
    whole circle. Grey images have neither saturation nor hue.
    """
    brightness, contrast, saturation, hue = (*strengths, 0.0, 0.0, 0.0)[:4]

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        factors = [
            jax.random.uniform(k, (), minval=max(0.0, 1 - s), maxval=1 + s)
            for k, s in zip(jax.random.split(key, 4)[:3], (brightness, contrast, saturation), strict=True)
        ]
        x = jnp.clip(factors[0] * image.astype(jnp.float32), 0, 255)
        x = _away(x, jnp.mean(_grey(x)), factors[1])
        if image.shape[-1] != 3:
            return x
        x = _away(x, _grey(x)[..., None], factors[2])
        return _turned(x, jax.random.uniform(jax.random.split(key, 4)[3], (), minval=-hue, maxval=hue)) if hue else x

    return _bytes(jax.vmap(one)(_each(key, len(images)), images))


def _away(image: jax.Array, origin: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(origin + factor * (image - origin), 0, 255)


def _grey(image: jax.Array) -> jax.Array:
    """[H, W], luma by ITU-R 601 of three channels, otherwise their mean."""
    if image.shape[-1] != 3:
        return jnp.mean(image, -1)
    return image @ jnp.array([0.299, 0.587, 0.114])


def _turned(image: jax.Array, turn: jax.Array) -> jax.Array:
    """[H, W, 3] in 0 to 255 with the hue of HSV moved by so much of the circle."""
    high, low = jnp.max(image, -1), jnp.min(image, -1)
    chroma = high - low
    safe = jnp.where(chroma > 0, chroma, 1)
    red, green, blue = (image[..., i] for i in range(3))
    sixths = jnp.where(high == red, (green - blue) / safe, jnp.where(high == green, 2 + (blue - red) / safe,
                                                                     4 + (red - green) / safe))  # fmt: skip
    sixths = sixths + 6 * turn
    # HSV to RGB in one formula: each channel is the value less the chroma, by its distance on the circle.
    places = (jnp.array([5.0, 3.0, 1.0]) + sixths[..., None]) % 6
    share = jnp.clip(jnp.minimum(places, 4 - places), 0, 1)
    return high[..., None] - chroma[..., None] * share


def blur(key: jax.Array, images: jax.Array, chance: float) -> jax.Array:
    """uint8 [B, H, W, C], each by that chance convolved with a Gaussian whose sigma is drawn from 0.1 to 2 pixels; the border
    is mirrored."""
    reach = min(int(np.ceil(3 * SIGMAS[1])), min(images.shape[1:3]) - 1)
    at = jnp.arange(-reach, reach + 1)

    def along(x: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
        padded = jnp.pad(x, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        return sum(w * jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i, w in enumerate(weights))

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        whether, sigma = jax.random.split(key)
        weights = jnp.exp(-(at**2) / (2 * jax.random.uniform(sigma, (), minval=SIGMAS[0], maxval=SIGMAS[1]) ** 2))
        weights = weights / jnp.sum(weights)
        soft = along(along(image.astype(jnp.float32), weights, 0), weights, 1)
        return jnp.where(jax.random.bernoulli(whether, chance), soft, image)

    return _bytes(jax.vmap(one)(_each(key, len(images)), images))


def erase(key: jax.Array, images: jax.Array, chance: float, fill: Sequence[int]) -> jax.Array:
    """uint8 [B, H, W, C], each by that chance with a box of one colour, `fill` [C]: the mean colour, which normalises to 0.

    Its area is drawn from 2 % to a third of the image's, the ratio of its sides from 0.3 to 3.3, evenly in its logarithm; a
    side longer than the image's is cut to that.
    """
    height, width = images.shape[1:3]
    colour = jnp.asarray(fill, jnp.uint8)

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        whether, area, ratio, row, column = jax.random.split(key, 5)
        size = jax.random.uniform(area, (), minval=AREAS[0], maxval=AREAS[1]) * height * width
        sides = jnp.exp(jax.random.uniform(ratio, (), minval=np.log(RATIOS[0]), maxval=np.log(RATIOS[1])))
        tall = jnp.clip(jnp.round(jnp.sqrt(size * sides)), 1, height).astype(jnp.int32)
        broad = jnp.clip(jnp.round(jnp.sqrt(size / sides)), 1, width).astype(jnp.int32)
        top = jax.random.randint(row, (), 0, height - tall + 1)
        left = jax.random.randint(column, (), 0, width - broad + 1)
        y, x = jnp.arange(height)[:, None], jnp.arange(width)[None]
        box = (y >= top) & (y < top + tall) & (x >= left) & (x < left + broad)
        return jnp.where((box & jax.random.bernoulli(whether, chance))[..., None], colour, image)

    return jax.vmap(one)(_each(key, len(images)), images)
