"""Convolutions on a CPU of images that have fewer pixels than what slides over them, as products.

XLA exchanges the two there (2x2 pixels under a kernel of 3x3; kernel and output's gradient alike), and has no library for what
comes of that: it takes twenty times as long and more (findings/cpu_small_maps_lose_eigen.sh).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pwkd_jax.models import depthwise

SUMMED = ("float32", "bfloat16", "float16")  # in float32


def serves(images: jax.Array, size, dtype) -> bool:
    """Whether images [B, H, W, C] are smaller than what slides over them, of `size` (h, w, ...) and `dtype`, and both are of a
    type that is summed in float32."""
    return images.shape[1] * images.shape[2] < size[0] * size[1] and images.dtype == dtype and images.dtype.name in SUMMED


def forward(images: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    """images [B, H, W, C], kernel [h, w, C, D]: [B, H', W', D], none of them 0. padding: ((low, high), (low, high))."""
    patches, made = _patches(images, kernel.shape[:2], strides, padding)
    found = lax.dot(patches, kernel.reshape(-1, kernel.shape[-1]), preferred_element_type=jnp.float32)
    return found.reshape(-1, *made, kernel.shape[-1]).astype(images.dtype)


def image_gradient(kernel: jax.Array, cotangent: jax.Array, size, strides, padding) -> jax.Array:
    """[B, H, W, C] of `size` (H, W): each pixel of the output's cotangent [B, H', W', D] times the kernel is a patch, and
    patches are added where they were read."""
    (height, width, channels, count), made = kernel.shape, cotangent.shape[1:3]
    flat = cotangent.reshape(-1, count), kernel.reshape(-1, count)
    patches = lax.dot_general(*flat, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    patches = patches.reshape(-1, *made, height, width, channels)

    def placed(*at):
        sides = zip(at, size, made, strides, padding, strict=True)
        pads = ((i - low, whole - (i - low) - (1 + stride * (m - 1)), stride - 1) for i, whole, m, stride, (low, _) in sides)
        return depthwise.pad(patches[:, :, :, *at], pads)

    return sum(placed(i, j) for i in range(height) for j in range(width)).astype(cotangent.dtype)


def kernel_gradient(images: jax.Array, cotangent: jax.Array, size, strides, padding) -> jax.Array:
    """[h, w, C, D] of `size` (h, w): the sum over images and pixels of patch x cotangent."""
    flat = _patches(images, size, strides, padding)[0], cotangent.reshape(-1, cotangent.shape[-1])
    found = lax.dot_general(*flat, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return found.reshape(*size, images.shape[-1], -1).astype(images.dtype)


def _patches(images: jax.Array, size, strides, padding) -> tuple[jax.Array, tuple[int, int]]:
    """(what each pixel of the output is computed from, a row each: [B * H' * W', h * w * C]; (H', W')). What JAX has for it,
    `lax.conv_general_dilated_patches`, is a convolution itself."""
    images = depthwise.pad(images, ((*p, 0) for p in padding))
    count, height, width, channels = images.shape
    top, left = (np.arange(0, whole - k + 1, s) for whole, k, s in zip((height, width), size, strides, strict=True))
    at = np.add.outer(np.add.outer(top * width, left), np.add.outer(np.arange(size[0]) * width, np.arange(size[1])))
    found = images.reshape(count, height * width, channels).at[:, at.ravel()].get(mode="promise_in_bounds")
    return found.reshape(count * len(top) * len(left), -1), (len(top), len(left))
