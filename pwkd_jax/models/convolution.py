"""Gradients of convolutions on a CPU, in the forms for which XLA has fast kernels there.

XLA hands a convolution to Eigen, as fast as PyTorch's, where it finds [images, height, width, channels] and a kernel [height,
width, in, out] with no axis out of place.

With respect to the kernel the gradient is to XLA a convolution of the images by a kernel as large as they are, for which Eigen
is several times slower on maps of 16x16 pixels or more (tests/bench/convolutions.py). It is also a matrix product: patches of
the images, [pixels, height * width * in], transposed, times the output's gradient, [pixels, out]; of a few images at a time, so
that the patches stay in the processor's cache.

With respect to the images it is a convolution by the kernel turned around. XLA puts the axes of JAX's in place, but in a
program's main computation alone: within loops and branches (several steps a dispatch, drawn widths) it is several times slower,
which is jax issue 12868.

Only where JAX has one device and that is a CPU; XLA's partitioner knows convolutions better than loops of products, and other
devices, pre-flight's included, have kernels of their own.
"""

import contextlib
import contextvars
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NUMBERS = ("NHWC", "HWIO", "NHWC")
# What a convolution may be told and still be one of these.
NEUTRAL = {"lhs_dilation": 1, "rhs_dilation": 1, "feature_group_count": 1, "batch_group_count": 1, "precision": None,
           "preferred_element_type": None}  # fmt: skip
# Maps of fewer pixels than this XLA's own gradients serve as well, and compile sooner.
PIXELS = 65
# Of one product: more leaves the cache, less is too little work for all threads.
PATCH_BYTES = 1 << 22

_own = contextvars.ContextVar("own", default=True)


@contextlib.contextmanager
def left_to_xla():
    """Context in which this file changes nothing: for a program that is lowered here to be reckoned for another device."""
    token = _own.set(False)
    try:
        yield
    finally:
        _own.reset(token)


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
    asked = {key for key, value in options.items() if np.any(np.not_equal(value, NEUTRAL.get(key, value)))}
    here = _own.get() and jax.default_backend() == "cpu" and jax.device_count() == 1
    if not here or asked or images.ndim != 4 or images.shape[1] * images.shape[2] < PIXELS:
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
    def own(images, kernel, cotangent):
        return (
            image_gradient(kernel, cotangent, images.shape[1:3], strides, padding),
            kernel_gradient(images, cotangent, kernel.shape[:2], strides, padding),
        )

    def default(images, kernel, cotangent):
        return jax.vjp(partial(_plain, strides=strides, padding=padding), images, kernel)[1](cotangent)

    return lax.platform_dependent(*saved, cotangent, cpu=own, default=default)


_convolve.defvjp(_forward, _backward)


def image_gradient(kernel: jax.Array, cotangent: jax.Array, size, strides, padding) -> jax.Array:
    """The output's cotangent [B, H', W', D], strides apart, convolved by the kernel [h, w, C, D] turned around: [B, H, W, C]
    of `size` (H, W). JAX has the same but for the kernel's axes, which it leaves where they are."""
    pads = []
    for whole, (low, _), stride, extent, made in zip(size, padding, strides, kernel.shape, cotangent.shape[1:], strict=False):
        before = extent - 1 - low
        pads.append((before, whole + extent - 1 - before - (1 + stride * (made - 1))))
    kernel = lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2)
    return lax.conv_general_dilated(cotangent, kernel, (1, 1), pads, lhs_dilation=strides, dimension_numbers=NUMBERS)


def kernel_gradient(images: jax.Array, cotangent: jax.Array, size, strides, padding) -> jax.Array:
    """sum over images and pixels of patch x cotangent: images [B, H, W, C], the output's cotangent [B, H', W', D], and a kernel
    of `size` (h, w) give [h, w, C, D]. Summed in float32, returned in the images' dtype."""
    count, height, width, made = cotangent.shape

    def product(images, cotangent):
        images = lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))
        patches, axes = images, (0, 1, 2)
        for axis in (2, 1):  # one after the other: as fast as all windows at once, and compiled in half the time
            taken, step = cotangent.shape[axis], strides[axis - 1]
            ends = [first + 1 + step * (taken - 1) for first in range(size[axis - 1])]
            windows = [lax.slice_in_dim(patches, first, end, step, axis) for first, end in enumerate(ends)]
            patches = jnp.concatenate(windows, axis=-1)
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
