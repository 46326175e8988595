"""Depthwise convolutions on a CPU as sums of shifted products, which XLA makes one loop of.

XLA's own go through every channel by itself, seven times slower and more, and its gradient of the kernel is that of a dense one
(tests/bench/layers.py).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

NUMBERS = ("NHWC", "HWIO", "NHWC")


def plain(images, kernel, strides, padding) -> jax.Array:
    """XLA's own: images [B, H, W, C], each channel convolved by its own kernel [h, w, 1, C]: [B, H', W', C]."""
    count = images.shape[-1]
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=NUMBERS, feature_group_count=count)


def forward(images: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    """The same as `plain`. padding: ((low, high), (low, high)). Summed in float32, returned in the images' dtype."""
    images = pad(images, ((*p, 0) for p in padding))
    made = [(whole - size) // stride + 1 for whole, size, stride in zip(images.shape[1:3], kernel.shape, strides, strict=False)]
    taps = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
    windows = _windows(images, kernel.shape[:2], made, strides)
    return sum(w.astype(jnp.float32) * tap for w, tap in zip(windows, taps, strict=True)).astype(images.dtype)


def image_gradient(kernel: jax.Array, cotangent: jax.Array, size, strides, padding) -> jax.Array:
    """The output's cotangent [B, H', W', C], strides apart, convolved by the kernel turned around: [B, H, W, C] of `size`."""
    pads = []
    for whole, (low, _), stride, extent, made in zip(size, padding, strides, kernel.shape, cotangent.shape[1:], strict=False):
        before = extent - 1 - low
        pads.append((before, whole + extent - 1 - before - (1 + stride * (made - 1)), stride - 1))
    return forward(pad(cotangent, pads), kernel[::-1, ::-1], (1, 1), ((0, 0), (0, 0)))


def kernel_gradient(images: jax.Array, cotangent: jax.Array, size, strides, padding) -> jax.Array:
    """sum over images and pixels of patch * cotangent, [h, w, 1, C] of `size` (h, w); of one image at a time, so that sums are
    over rows of [width, channels] that the processor takes as vectors."""
    images = pad(images, ((*p, 0) for p in padding))
    made, width, count = cotangent.shape[1:]

    def add(totals, one):
        image, cotangent = (x[None].astype(jnp.float32) for x in one)
        windows = _windows(image, size, (made, width), strides)
        return tuple(t + jnp.sum(w * cotangent, (0, 1)) for t, w in zip(totals, windows, strict=True)), None

    totals, _ = lax.scan(add, (jnp.zeros((width, count)),) * (size[0] * size[1]), (images, cotangent))
    return jnp.stack([jnp.sum(t, 0) for t in totals]).reshape(*size, 1, count).astype(images.dtype)


def pad(images: jax.Array, pads) -> jax.Array:
    return lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), *pads, (0, 0, 0)))


def _windows(images: jax.Array, size, made, strides) -> Iterator[jax.Array]:
    """For each place of the kernel, row by row, the pixels [B, H', W', C] that it meets."""
    for i in range(size[0]):
        for j in range(size[1]):
            rows, columns = (slice(k, k + 1 + s * (m - 1), s) for k, s, m in zip((i, j), strides, made, strict=True))
            yield images[:, rows, columns]
