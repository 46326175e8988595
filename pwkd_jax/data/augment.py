"""What happens to a batch of uint8 images inside the jitted step: crop, flip, what else a recipe asks for, normalisation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.data import colours, policies
from pwkd_jax.errors import UserError


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images / 255 - mean) / std: uint8 [B, H, W, C] -> float32 [B, H, W, C]; float images, in [0, 1] already, are not
    divided.

    mean, std: one number a channel, in units of pixel values in [0, 1]. Raises UserError where their number is not C.
    """
    for key, values in (("data.mean", mean), ("data.std", std)):
        if len(values) != images.shape[-1]:
            raise UserError(f"{key}: {len(values)} numbers for images of {images.shape[-1]} channels; give one a channel")
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    scale = 255 if jnp.issubdtype(images.dtype, jnp.integer) else 1
    return (images.astype(jnp.float32) / scale - mean) / std


def augment(
    key: jax.Array,
    images: jax.Array,
    crop_padding: int,
    flip: bool,
    policy: policies.Policy | None = None,
    jitter: Sequence[float] = (),
    blur: float = 0.0,
    erasing: float = 0.0,
    fill: Sequence[int] = (),
) -> jax.Array:
    """Random crop and horizontal flip of each image, and what else is asked for: uint8 [B, H, W, C] -> uint8 [B, H, W, C].

    crop_padding: zero pixels added on each side before a crop of the original size at one of the
    (2 * crop_padding + 1)^2 offsets, all equally likely. Padding comes before normalisation, so the border is black,
    not the mean colour. flip: mirror left to right with probability 1/2. Then `policy`, and jitter (strengths), blur (its
    chance) and erasing (its chance, by colour `fill`) as `colours` has them. With 0 and False the images come back as they are.

    Row i's numbers are a function of (key, i) alone, i being its position in the global batch: neither the number of
    devices nor the batch size changes them.
    """
    batch, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        offsets = jax.random.randint(crop_key, (batch, 2), 0, 2 * crop_padding + 1)
        padded = jnp.pad(images, ((0, 0), (crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0)))
        images = jax.vmap(lambda x, o: jax.lax.dynamic_slice(x, (*o, 0), (height, width, channels)))(padded, offsets)
    if flip:
        flipped = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    own = [jax.random.fold_in(key, number) for number in range(2, 6)]
    images = policy(own[0], images) if policy else images
    images = colours.jitter(own[1], images, jitter) if any(jitter) else images
    images = colours.blur(own[2], images, blur) if blur else images
    return colours.erase(own[3], images, erasing, fill) if erasing else images


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel of uint8 [N, H, W, C], in units of pixel values in [0, 1].

    Population standard deviation, from exact integer sums over every pixel. Raises UserError for a channel that never
    varies, by whose deviation nothing can be divided.
    """
    channels = images.shape[-1]
    count = images.size // channels
    total, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    pixels = images.reshape(-1, channels)
    for start in range(0, count, 1 << 20):  # a few MB of wider integers at a time
        block = pixels[start : start + (1 << 20)].astype(np.int64)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
    # Python integers from here on: count * squares does not fit 64 bits for a large data set.
    means, deviations = [], []
    for channel, (s, q) in enumerate(zip(total.tolist(), squares.tolist(), strict=True)):
        if not (variance := count * q - s * s):
            raise UserError(
                f"data.std: channel {channel} of the training images never varies, so its standard deviation is 0; "
                "set data.mean and data.std"
            )
        means.append(s / (255 * count))
        deviations.append(variance**0.5 / (255 * count))
    return tuple(means), tuple(deviations)
