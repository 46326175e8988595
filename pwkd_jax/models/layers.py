"""Layers that the families share, with the constants and initialisers of the reference networks."""

from functools import partial

import flax.linen as nn
import jax

# Normal with variance 2 / (k * k * channels out), He et al. 2015; for grouped kernels too, as PyTorch counts them.
Conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"))
# Flax's momentum is the fraction kept: PyTorch's 0.1 is 0.9 here. Of a batch's variance Flax keeps the biased estimate where
# PyTorch keeps the unbiased one: for n values a channel, statistics trained here are smaller by (n - 1) / n.
BatchNorm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)

# What PyTorch gives a layer that nobody initialises: uniform within 1 / sqrt(fan in), kernel and bias alike.
uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
small_normal = nn.initializers.normal(0.01)


def uniform_bias(fan_in: int):
    bound = fan_in**-0.5
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, -bound, bound)


def affine(norm: nn.Module) -> tuple[jax.Array, jax.Array]:
    """(scale [C], bias [C]) of a normalisation layer that has run."""
    return norm.variables["params"]["scale"], norm.variables["params"]["bias"]


def classify(pooled: jax.Array, num_classes: int, kernel_init=uniform, bias_init=None, dropout: float = 0.0):
    """(logits [B, classes], (kernel, bias)) of a linear layer `classifier` of the calling module on [B, D].

    dropout: chance of each of the D features being left out; 0 where the network predicts.
    """
    bias_init = bias_init or uniform_bias(pooled.shape[-1])
    layer = nn.Dense(num_classes, kernel_init=kernel_init, bias_init=bias_init, name="classifier")
    logits = layer(nn.Dropout(dropout, deterministic=False)(pooled) if dropout else pooled)
    return logits, (layer.variables["params"]["kernel"], layer.variables["params"]["bias"])


def drop_path(branch: jax.Array, rate: float) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): the branch [B, ...] of a residual block, of each image left out with chance `rate`
    and otherwise divided by 1 - rate, as timm and torchvision do; rate is 0 where the network predicts."""
    return nn.Dropout(rate, broadcast_dims=tuple(range(1, branch.ndim)), deterministic=False)(branch) if rate else branch


def drop_rates(rate: float, blocks: int) -> list[float]:
    """Of each residual block in turn, rising evenly from 0 to `rate`, as in timm and DeiT."""
    return [rate * b / max(blocks - 1, 1) for b in range(blocks)]
