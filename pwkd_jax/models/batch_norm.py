"""Flax's batch norm of a batch, the same numbers to rounding, with its gradient in closed form: of two sums over the images,
where the derivative of the formula as Flax has it takes three, and on a GPU more kernels (tests/bench/gpu_structure.py).

On a CPU XLA takes such sums one channel after another, each through all of the memory: two to fourteen times the
processor time (tests/bench/layers.py) of a loop over rows of pixels, which adds whole rows and reads it once. For images that
a core's cache holds a loop is not worth its compilation (`convolution.large`).
"""

import math
from collections.abc import Callable
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def serves(layer: nn.BatchNorm, x: jax.Array, use_running_average: bool | None = None, *, mask=None) -> bool:
    """Whether `train` is what this call of the layer is to do, and can."""
    if nn.merge_param("use_running_average", layer.use_running_average, use_running_average) or layer.is_initializing():
        return False
    # Flax makes what is missing and refuses what has another shape; in a `shard_map` of the user's own it knows what varies.
    names = (("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var"))
    if not all(layer.has_variable(*name) for name in names) or jax.sharding.get_abstract_mesh().manual_axes:
        return False
    if any(jnp.shape(nn.meta.unbox(layer.get_variable(*name))) != x.shape[-1:] for name in names):
        return False
    usual = mask is None and layer.axis in (-1, 3) and layer.axis_name is None and layer.use_scale and layer.use_bias
    known = all(jnp.dtype(d) in ("float32", "bfloat16") for d in (x.dtype, layer.dtype or x.dtype, layer.param_dtype))
    summed = layer.use_fast_variance and layer.force_float32_reductions and x.ndim == 4
    return bool(usual and known and summed)


def train(layer: nn.BatchNorm, x: jax.Array, by_rows: bool) -> jax.Array:
    """The layer on x [B, H, W, C], its running statistics moved, as its own call does with `use_running_average=False`.
    by_rows: whether a CPU sums as in `sums`."""
    scale, bias = (nn.meta.unbox(layer.get_variable("params", name)) for name in ("scale", "bias"))
    out, *moments = normalise(x, scale, bias, layer.epsilon, by_rows)
    out = out.astype(layer.dtype or jnp.result_type(x, scale, bias))
    for name, new in zip(("mean", "var"), moments, strict=True):
        old = layer.get_variable("batch_stats", name)
        layer.put_variable("batch_stats", name, layer.momentum * old + (1 - layer.momentum) * new)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, by_rows: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, H, W, C] by its mean and variance over all but channels, times scale [C], plus bias [C]; mean [C]; variance [C],
    biased, as E[x^2] - E[x]^2. All in float32, from float32 or bfloat16. Ioffe and Szegedy 2015. Differentiated in reverse
    mode alone."""
    return _forward(x, scale, bias, epsilon, by_rows)[0]


@partial(jax.jit, static_argnums=(3, 4), inline=True)  # traced once for all layers of a shape
def _forward(x, scale, bias, epsilon, by_rows):
    count = x.size // x.shape[-1]
    mean, square = (total / count for total in sums(lambda x: (_float32(x), _float32(x) ** 2), x, by_rows=by_rows))
    var = jnp.maximum(0.0, square - mean * mean)
    inverse = lax.rsqrt(var + epsilon)
    return ((_float32(x) - mean) * (inverse * scale) + bias, mean, var), (x, scale, bias, mean, var)


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _backward(epsilon, by_rows, saved, cotangents):
    x, scale, bias, mean, var = saved
    cotangent, of_mean, of_var = cotangents
    count, inverse = x.size // x.shape[-1], lax.rsqrt(var + epsilon)
    by_bias, product = sums(lambda g, x: (g, g * (_float32(x) - mean)), cotangent, x, by_rows=by_rows)
    by_scale, by_out = product * inverse, inverse * scale
    # Of the moments come zeros, where nothing but the running statistics reads them.
    by_centred = (jnp.where(var > 0, of_var * 2, 0) - by_out * inverse * by_scale) / count
    by_x = cotangent * by_out + (_float32(x) - mean) * by_centred + (of_mean - by_out * by_bias) / count
    return by_x.astype(x.dtype), by_scale.astype(scale.dtype), by_bias.astype(bias.dtype)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


normalise.defvjp(_forward, _backward)


def sums(terms: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array, by_rows: bool) -> tuple[jax.Array, ...]:
    """The arrays `terms(*arrays)`, of the arrays' own shape [B, H, W, C], summed over all but channels: [C] each."""

    if not by_rows:
        return tuple(jnp.sum(x, (0, 1, 2)) for x in terms(*arrays))

    images, height, *row = arrays[0].shape
    few = math.gcd(4, images * height)  # rows a turn, which by itself costs about as much as adding one

    def add(totals, rows):
        each = [terms(*(some[i] for some in rows)) for i in range(few)]
        return tuple(t + reduce(jnp.add, new) for t, *new in zip(totals, *each, strict=True)), None

    zeros = tuple(jnp.zeros(row, x.dtype) for x in jax.eval_shape(terms, *arrays))
    totals, _ = lax.scan(add, zeros, tuple(x.reshape(-1, few, *row) for x in arrays))
    return tuple(jnp.sum(t, 0) for t in totals)
