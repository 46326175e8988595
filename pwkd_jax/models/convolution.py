"""Convolutions on a CPU: their gradient with respect to the kernel as matrix products.

XLA hands a convolution and its gradient with respect to the images to Eigen's kernels, which are as fast as PyTorch's. The
gradient with respect to the kernel is to XLA a convolution too, of images by a kernel as large as they are, for which Eigen is
several times slower on maps of 16 pixels or more (tests/bench/convolutions.py). It is also a matrix product: patches of
the images, [pixels, height * width * channels in], transposed, times the output's gradient, [pixels, channels out]. A few
images at a time, so that the patches stay in the processor's cache.

Only where JAX has one device and that is a CPU. For other devices, pre-flight's included, XLA keeps its own.
"""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

NUMBERS = ("NHWC", "HWIO", "NHWC")
# Of one product: more leaves the cache, less is too little work for all threads.
PATCH_BYTES = 1 << 22


def products():
    """Context in which every `nn.Conv` that is traced, in whoever's model, has the gradient of this file."""

    def intercept(call, args, kwargs, context):
        layer = context.module
        if not (isinstance(layer, nn.Conv) and layer.conv_general_dilated is None and context.method_name == "__call__"):
            return call(*args, **kwargs)
        # A layer is a frozen dataclass that may belong to the user, so it is left as it was.
        object.__setattr__(layer, "conv_general_dilated", convolve)
        try:
            return call(*args, **kwargs)
        finally:
            object.__setattr__(layer, "conv_general_dilated", None)

    return nn.intercept_methods(intercept)


def convolve(images: jax.Array, kernel: jax.Array, window_strides, padding, **options) -> jax.Array:
    """`lax.conv_general_dilated`, with the gradient of this file where it serves."""
    ones = (1, 1)
    plain = all(tuple(options.get(key) or ones) == ones for key in ("lhs_dilation", "rhs_dilation"))
    groups = options.get("feature_group_count", 1) * options.get("batch_group_count", 1)
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or images.ndim != 4 or not plain or groups != 1:
        return lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], window_strides, padding)
    return _convolve(images, kernel, tuple(window_strides), tuple(map(tuple, padding)))


def _plain(images, kernel, strides, padding):
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=NUMBERS)


_convolve = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))


def _forward(images, kernel, strides, padding):
    return _plain(images, kernel, strides, padding), (images, kernel)


def _backward(strides, padding, saved, cotangent):
    images, kernel = saved
    (to_images,) = jax.vjp(lambda x: _plain(x, kernel, strides, padding), images)[1](cotangent)

    def convolution(images, cotangent):
        return jax.vjp(lambda k: _plain(images, k, strides, padding), kernel)[1](cotangent)[0]

    product = partial(kernel_gradient, size=kernel.shape[:2], strides=strides, padding=padding)
    return to_images, lax.platform_dependent(images, cotangent, cpu=product, default=convolution)


_convolve.defvjp(_forward, _backward)


def kernel_gradient(images: jax.Array, cotangent: jax.Array, size, strides, padding) -> jax.Array:
    """sum over images and pixels of patch x cotangent: images [B, H, W, C], the output's cotangent [B, H', W', D], and a kernel
    of `size` (h, w) give [h, w, C, D]. Summed in float32, returned in the images' dtype."""
    count, height, width, made = cotangent.shape

    def product(images, cotangent):
        images = lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))
        ends = (1 + strides[0] * (height - 1), 1 + strides[1] * (width - 1))
        patches = [
            images[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
            for i, j in itertools.product(*map(range, size))
        ]
        patches, axes = jnp.concatenate(patches, axis=-1), (0, 1, 2)
        return lax.dot_general(patches, cotangent, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)

    shape = (*size, images.shape[-1], made)
    of_one = 4 * height * width * size[0] * size[1] * images.shape[-1]
    chunk = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * of_one <= PATCH_BYTES))
    if size == (1, 1) or chunk == count:
        return product(images, cotangent).reshape(shape).astype(images.dtype)

    def add(total, part):
        return total + product(*part), None

    parts = (x.reshape(-1, chunk, *x.shape[1:]) for x in (images, cotangent))
    total, _ = lax.scan(add, jnp.zeros((size[0] * size[1] * images.shape[-1], made), jnp.float32), tuple(parts))
    return total.reshape(shape).astype(images.dtype)
