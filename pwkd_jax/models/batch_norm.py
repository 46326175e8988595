"""Flax's batch norm of a batch, the same numbers to rounding, with its gradient in closed form: of two sums over the images,
where the derivative of the formula as Flax has it takes three, and on a GPU more kernels (tests/bench/gpu_structure.py). What
is computed of each pixel is one product and one sum, so that no array is centred first.
"""

from functools import partial

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


def train(layer: nn.BatchNorm, x: jax.Array) -> jax.Array:
    """The layer on x [B, H, W, C], its running statistics moved, as its own call does with `use_running_average=False`."""
    scale, bias = (nn.meta.unbox(layer.get_variable("params", name)) for name in ("scale", "bias"))
    out, *moments = normalise(x, scale, bias, layer.epsilon)
    out = out.astype(layer.dtype or jnp.result_type(x, scale, bias))
    for name, new in zip(("mean", "var"), moments, strict=True):
        old = layer.get_variable("batch_stats", name)
        layer.put_variable("batch_stats", name, layer.momentum * old + (1 - layer.momentum) * new)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, H, W, C] by its mean and variance over all but channels, times scale [C], plus bias [C]; mean [C]; variance [C],
    biased, as E[x^2] - E[x]^2. All in float32, from float32 or bfloat16. Ioffe and Szegedy 2015. Differentiated in reverse
    mode alone."""
    return _forward(x, scale, bias, epsilon)[0]


@partial(jax.jit, static_argnums=3, inline=True)  # traced once for all layers of a shape
def _forward(x, scale, bias, epsilon):
    count = x.size // x.shape[-1]
    mean, square = (_sum(y) / count for y in (_float32(x), _float32(x) ** 2))
    var = jnp.maximum(0.0, square - mean * mean)
    by_out = lax.rsqrt(var + epsilon) * scale
    return (_float32(x) * by_out + (bias - mean * by_out), mean, var), (x, scale, bias, mean, var)


@partial(jax.jit, static_argnums=0, inline=True)
def _backward(epsilon, saved, cotangents):
    x, scale, bias, mean, var = saved
    cotangent, of_mean, of_var = cotangents
    count, inverse = x.size // x.shape[-1], lax.rsqrt(var + epsilon)
    by_bias = _sum(cotangent)
    by_scale = (_sum(cotangent * _float32(x)) - mean * by_bias) * inverse
    by_out = inverse * scale
    # Of the moments come zeros, where nothing but the running statistics reads them.
    by_centred = (jnp.where(var > 0, of_var * 2, 0) - by_out * inverse * by_scale) / count
    by_x = cotangent * by_out + _float32(x) * by_centred + ((of_mean - by_out * by_bias) / count - mean * by_centred)
    return by_x.astype(x.dtype), by_scale.astype(scale.dtype), by_bias.astype(bias.dtype)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, (0, 1, 2))


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


normalise.defvjp(_forward, _backward)
