"""Convolutions on a CPU in the forms for which XLA has fast kernels there.

XLA hands a convolution to Eigen, as fast as PyTorch's, where it finds [images, height, width, channels] and a kernel [height,
width, in, out] with no axis out of place. The gradients are convolutions too, the images' by the kernel turned around, the
kernel's of the images by the output's gradient, but JAX leaves their axes where they are. XLA puts them in place, but in a
program's main computation alone: within loops and branches (several steps a dispatch, drawn widths) it is many times
slower, which is jax issue 12868. Here they are put in place from the start. Depthwise convolutions are in depthwise.py, and
those of images smaller than their kernel in small_maps.py.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pwkd_jax.models import depthwise, small_maps

LARGE = 2**20  # bytes
NUMBERS = ("NHWC", "HWIO", "NHWC")
# What a convolution may be told and still be one of these.
NEUTRAL = {"lhs_dilation": 1, "rhs_dilation": 1, "feature_group_count": 1, "batch_group_count": 1, "precision": None,
           "preferred_element_type": None}  # fmt: skip


def convolve(images: jax.Array, kernel: jax.Array, window_strides, padding, **options) -> jax.Array:
    """`lax.conv_general_dilated`, in the forms of this file where they serve."""
    asked = {key for key, value in options.items() if np.any(np.not_equal(value, NEUTRAL.get(key, value)))}
    each = asked == {"feature_group_count"} and options["feature_group_count"] == images.shape[-1] == kernel.shape[-1]
    if images.ndim != 4 or (asked and not each):
        return lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], window_strides, padding)
    sides = zip(images.shape[1:3], padding, kernel.shape, window_strides, strict=False)
    made = [(whole + sum(p) - extent) // stride + 1 for whole, p, extent, stride in sides]
    if min(len(images), *made) < 1:  # XLA knows what is in nothing
        return lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    own = _depthwise if each else _small if small_maps.serves(images, kernel.shape, kernel.dtype) else _dense
    return own(images, kernel, tuple(window_strides), tuple(map(tuple, padding)))


def _plain(images, kernel, strides, padding):
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=NUMBERS)


def image_gradient(kernel: jax.Array, cotangent: jax.Array, size, strides, padding) -> jax.Array:
    """The output's cotangent [B, H', W', D], strides apart, convolved by the kernel [h, w, C, D] turned around: [B, H, W, C]
    of `size` (H, W). JAX has the same but for the kernel's axes, which it leaves where they are."""
    if small_maps.serves(cotangent, kernel.shape, kernel.dtype):
        return small_maps.image_gradient(kernel, cotangent, size, strides, padding)
    pads = []
    for whole, (low, _), stride, extent, made in zip(size, padding, strides, kernel.shape, cotangent.shape[1:], strict=False):
        before = extent - 1 - low
        pads.append((before, whole + extent - 1 - before - (1 + stride * (made - 1))))
    kernel = lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2)
    return lax.conv_general_dilated(cotangent, kernel, (1, 1), pads, lhs_dilation=strides, dimension_numbers=NUMBERS)


def kernel_gradient(images: jax.Array, cotangent: jax.Array, size, strides, padding) -> jax.Array:
    """sum over images and pixels of patch x cotangent: images [B, H, W, C], the output's cotangent [B, H', W', D], and a kernel
    of `size` (h, w) give [h, w, C, D]. Summed in float32, returned in the images' dtype.

    A convolution in which channels are the images, [C, H, W, B], and the cotangent is the kernel, [H', W', B, D]; of one pixel
    (h = w = 1) a product."""
    made, pads, dtype = cotangent.shape[1:3], [], images.dtype
    if any(small_maps.serves(images, slid, dtype) for slid in (size, made)):
        return small_maps.kernel_gradient(images, cotangent, size, strides, padding)
    for whole, (low, _), stride, extent, count in zip(images.shape[1:3], padding, strides, size, made, strict=True):
        pads.append((low, extent + stride * (count - 1) - whole - low))
    if size == (1, 1):
        images = depthwise.pad(images, ((*p, 0) for p in pads))
        images = images[:, :: strides[0], :: strides[1]]
        flat = (x.reshape(-1, x.shape[-1]) for x in (images, cotangent))  # summed over several axes they would be transposed
        found = lax.dot_general(*flat, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)[None, None]
    else:
        images, cotangent = _moved(images, cotangent)
        if min(min(pads)) < 0:
            images, pads = depthwise.pad(images, ((*p, 0) for p in pads)), "VALID"
        found = lax.conv_general_dilated(images, cotangent, (1, 1), pads, rhs_dilation=strides, dimension_numbers=NUMBERS,
                                         preferred_element_type=jnp.float32).transpose(1, 2, 0, 3)  # fmt: skip
    return found.astype(dtype)


def _moved(images: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, H, W, C] as [C, H, W, B], and [B, H', W', D] as [H', W', B, D]; large ones within a branch. By themselves XLA would
    compute the arrays anew, from whatever layers it can go back to, and read all of their outputs against the order of memory;
    a branch is given the arrays as they are. An optimization barrier would not do: XLA's CPU compiler drops it first
    (findings/cpu_barrier_stops_no_fusion.sh). Under vmap a branch is none, and nothing is held apart."""

    def move(images, cotangent):
        return images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)

    if images.size * images.dtype.itemsize < LARGE:  # a core's cache holds them
        return move(images, cotangent)
    either = images.ravel()[0] == 0  # which way is the same, and not known before
    return lax.cond(either, move, move, images, cotangent)


def _with(plain: Callable, forward: Callable, by_images: Callable, by_kernel: Callable) -> Callable:
    """plain(images, kernel, strides, padding), which on a CPU has another forward pass and these gradients."""

    def run(images, kernel, strides, padding):
        how = {"strides": strides, "padding": padding}
        if forward is plain:
            return plain(images, kernel, **how)
        return lax.platform_dependent(images, kernel, cpu=partial(forward, **how), default=partial(plain, **how))

    def kept(images, kernel, strides, padding):
        return run(images, kernel, strides, padding), (images, kernel)

    def backward(strides, padding, saved, cotangent):
        images, kernel = saved
        return (
            by_images(kernel, cotangent, images.shape[1:3], strides, padding),
            by_kernel(images, cotangent, kernel.shape[:2], strides, padding),
        )

    found = jax.custom_vjp(run, nondiff_argnums=(2, 3))
    found.defvjp(kept, backward)
    return found


_dense = _with(_plain, _plain, image_gradient, kernel_gradient)
_small = _with(_plain, small_maps.forward, image_gradient, kernel_gradient)
_depthwise = _with(depthwise.plain, depthwise.forward, depthwise.image_gradient, depthwise.kernel_gradient)

